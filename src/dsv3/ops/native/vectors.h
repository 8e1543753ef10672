// Sixteen numbers at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dsv3 {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));

inline v16 load(const float* p) { v16 v; std::memcpy(&v, p, 64); return v; }
inline void store(float* p, v16 v) { std::memcpy(p, &v, 64); }
inline v16 all(float x) { return v16{} + x; }
inline v16 to_float(i16v v) { return __builtin_convertvector(v, v16); }

inline float sum(v16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s[16];
    store(s, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
#endif
}

// e to the x within 2 units in the last place: 2^n times a polynomial, n whole.
inline v16 exp(v16 x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const v16 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the whole part is in the last bits
    const v16 n = shifted - 12582912.0f;
    const v16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    v16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (v16)(((i16v)shifted << 23) + (i16v)p);
}

}  // namespace dsv3
