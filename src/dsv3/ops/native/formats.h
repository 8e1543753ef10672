// Number formats of fewer than 32 bits, bit by bit as ops/formats.py has them.
#pragma once
#include <cstdint>
#include <cstring>

namespace dsv3 {

inline uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float number(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

// A format with E exponent and M mantissa bits as a code of its own width; NaN has all bits but the sign set.
template <int E, int M> struct Coder {
    static constexpr int bias = (1 << (E - 1)) - 1;
    static constexpr int shift = 23 - M;
    float largest;
    uint32_t encode(float x) const {
        const uint32_t sign = bits(x) >> 31;
        float v = number(bits(x) & 0x7FFFFFFFu);
        const bool nan = v != v;
        v = v > largest ? largest : v;
        const uint32_t u = bits(v);
        const uint32_t rounded = (u + ((1u << (shift - 1)) - 1) + ((u >> shift) & 1)) >> shift;
        const uint32_t normal = rounded - (uint32_t(127 - bias) << M);
        // Below the smallest normal the spacing is 2^(1 - bias - M): adding a number whose own spacing that is
        // rounds to it.
        const float magic = number(uint32_t(127 + 23 + 1 - bias - M) << 23);
        const uint32_t small = bits(v + magic) - bits(magic);
        const float smallest = number(uint32_t(128 - bias) << 23);
        uint32_t code = v < smallest ? small : normal;
        code = nan ? (1u << (E + M)) - 1 : code;
        return (sign << (E + M)) | code;
    }
    float decode(uint32_t code) const {
        const uint32_t magnitude = code & ((1u << (E + M)) - 1);
        float v = number(magnitude << shift) * number(uint32_t(254 - bias) << 23);
        // E4M3 spends one code on NaN; the others have infinities (never written here) and NaNs above.
        const uint32_t top = E == 4 ? (1u << (E + M)) - 1 : (uint32_t((1 << E) - 1) << M);
        const uint32_t special = (E == 4 || magnitude > top) ? 0x7FC00000u : 0x7F800000u;
        v = magnitude >= top ? number(special) : v;
        return number(bits(v) | ((code >> (E + M)) << 31));
    }
};

}  // namespace dsv3
