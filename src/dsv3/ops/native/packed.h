// Products with weights as they are kept: FP32, BF16, INT8 a channel and INT4 a group (ops/integers.py), FP8 in
// blocks of 128 x 128 (ops/blocks.py).
//
// Every sum over the inputs has one order, whatever is computed beside it: a token's numbers do not depend on
// how many tokens share the pass, nor on the number of threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace dsv3 {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));

inline v16 load(const float* p) { v16 v; std::memcpy(&v, p, 64); return v; }
inline void store(float* p, v16 v) { std::memcpy(p, &v, 64); }
inline v16 all(float x) { return v16{} + x; }

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

inline int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

enum Kind : int64_t { FP32, BF16, INT8, INT4, FP8 };
constexpr int BITS[] = {32, 16, 8, 4, 8};
constexpr int64_t BLOCK = 128;

// [outputs, inputs], or a stack of such (experts). Laid out as ops/integers.py says; the same in Python's ctypes.
struct Matrix {
    const uint8_t* values;
    const float *scales, *leasts;
    int64_t outputs, inputs, group, kind;
    int64_t skipped;  // outputs before the first, in their first block (FP8)

    int64_t row_bytes() const {
        return kind == INT4 ? padded(inputs) / 2 : inputs * BITS[kind] / 8;
    }
    // Scales of a row (of FP8: of a row of blocks).
    int64_t row_scales() const {
        if (kind == INT4) return (inputs + group - 1) / group;
        return kind == FP8 ? (inputs + BLOCK - 1) / BLOCK : kind == INT8;
    }
    // Matrix e of a stack; or, with first, what begins at one of its outputs.
    Matrix at(int64_t e, int64_t first = 0) const {
        Matrix m = *this;
        m.values += (e * outputs + first) * row_bytes();
        const int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
        const int64_t row = kind == FP8 ? e * blocks + (skipped + first) / BLOCK : e * outputs + first;
        if (scales) m.scales += row * row_scales();
        if (leasts) m.leasts += row * row_scales();
        m.skipped = (skipped + first) % BLOCK;
        return m;
    }
};

// Inputs that have a scale together; INT8's is left for the sum.
template <int kind> inline int64_t span(const Matrix& m) {
    return kind == INT4 ? m.group : kind == FP8 ? BLOCK : m.inputs;
}

// What the numbers of a span stand for: INT4's sixteen, FP8's scale.
template <int kind> inline v16 levels(const Matrix& m, int64_t row, int64_t span, int64_t row_scales) {
    constexpr v16 up = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if constexpr (kind == INT4) {
        const int64_t g = row * row_scales + span;
        return up * m.scales[g] + m.leasts[g];
    } else if constexpr (kind == FP8) {
        return all(m.scales[(m.skipped + row) / BLOCK * row_scales + span]);
    }
    return v16{};
}

// E4M3: with its exponent and mantissa where FP32 has them, a number is 2^120 times too small.
inline v16 e4m3(const uint8_t* p) {
#ifdef __AVX512F__
    const u16v codes = (u16v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    u16v codes;
    for (int i = 0; i < 16; ++i) codes[i] = p[i];
#endif
    const u16v magnitude = codes & 0x7Fu, sign = (codes & 0x80u) << 24;
    const v16 v = (v16)(magnitude << 20) * 0x1p120f;
    return (v16)(magnitude == 0x7Fu ? u16v{} + 0x7FC00000u : (u16v)v | sign);
}

// 32 numbers of a row from input k on; n of them exist.
template <int kind>
inline void numbers(const Matrix& m, int64_t row, int64_t k, int64_t n, v16 level, v16& low, v16& high) {
    const uint8_t* p = m.values + row * m.row_bytes();
    if constexpr (kind == INT4) {
        p += k / 2;
#ifdef __AVX512F__
        const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        low = (v16)_mm512_permutexvar_ps(both, (__m512)level);  // which looks at the last four bits only
        high = (v16)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)level);
#else
        for (int i = 0; i < 16; ++i) { low[i] = level[p[i] & 15]; high[i] = level[p[i] >> 4]; }
#endif
        return;
    }
    constexpr int width = kind == FP32 ? 4 : kind == BF16 ? 2 : 1;
    uint8_t edge[32 * width];
    p += k * width;
    if (n < 32) {
        std::memset(edge, 0, sizeof edge);
        std::memcpy(edge, p, n * width);
        p = edge;
    }
    if constexpr (kind == FP32) {
        std::memcpy(&low, p, 64);
        std::memcpy(&high, p + 64, 64);
    } else if constexpr (kind == BF16) {
        typedef uint16_t u16 __attribute__((vector_size(32)));
        u16 a, b;
        std::memcpy(&a, p, 32);
        std::memcpy(&b, p + 32, 32);
        low = (v16)(__builtin_convertvector(a, u16v) << 16);
        high = (v16)(__builtin_convertvector(b, u16v) << 16);
    } else if constexpr (kind == FP8) {
        low = e4m3(p) * level;
        high = e4m3(p + 16) * level;
    } else {
#ifdef __AVX512F__
        low = (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
        high = (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
#else
        for (int i = 0; i < 16; ++i) { low[i] = (int8_t)p[i]; high[i] = (int8_t)p[i + 16]; }
#endif
    }
}

inline float factor(const Matrix& m, int64_t row) { return m.kind == INT8 ? m.scales[row] : 1.0f; }

// A row as FP32, filled up to a multiple of 32 (INT4 not with zeros: those of x do); without the factor.
template <int kind> inline void decode(const Matrix& m, int64_t row, float* out) {
    const int64_t scales = m.row_scales(), wide = span<kind>(m);
    v16 level{};
    for (int64_t k = 0; k < m.inputs; k += 32) {
        v16 low, high;
        if (k % wide == 0) level = levels<kind>(m, row, k / wide, scales);
        numbers<kind>(m, row, k, m.inputs - k, level, low, high);
        store(out + k, low);
        store(out + k + 16, high);
    }
}

// O outputs of R rows of x. Rows are filled up with zeros to a multiple of 32.
template <int kind, int O, int R>
inline void tile(const Matrix& m, int64_t first, const float* const* x, float* y, int64_t y_stride) {
    v16 sums[O][R] = {}, level[O];
    const int64_t wide = span<kind>(m), ahead = O * m.row_bytes(), scales = m.row_scales();
    for (int64_t begin = 0, s = 0; begin < m.inputs; begin += wide, ++s) {
        for (int o = 0; o < O; ++o) level[o] = levels<kind>(m, first + o, s, scales);
        const int64_t end = begin + wide < m.inputs ? begin + wide : m.inputs;
        for (int64_t k = begin; k < end; k += 32) {
            v16 low[O], high[O];
            for (int o = 0; o < O; ++o) {
                if (kind != FP32) __builtin_prefetch(m.values + (first + o) * m.row_bytes() + ahead + k * BITS[kind] / 8);
                numbers<kind>(m, first + o, k, m.inputs - k, level[o], low[o], high[o]);
            }
            for (int r = 0; r < R; ++r) {
                const v16 a = load(x[r] + k), b = load(x[r] + k + 16);
                for (int o = 0; o < O; ++o) {
                    sums[o][r] += low[o] * a;
                    sums[o][r] += high[o] * b;
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) y[r * y_stride + first + o] = sum(sums[o][r]) * factor(m, first + o);
}

template <int kind, int O>
inline void rows_of(const Matrix& m, int64_t first, const float* const* x, int64_t rows, float* y, int64_t y_stride) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) tile<kind, O, 4>(m, first, x + r, y + r * y_stride, y_stride);
    if (rows - r >= 2) {
        tile<kind, O, 2>(m, first, x + r, y + r * y_stride, y_stride);
        r += 2;
    }
    if (rows - r) tile<kind, O, 1>(m, first, x + r, y + r * y_stride, y_stride);
}

constexpr int64_t DECODE_FROM = 8;  // rows of x from which a few outputs' weights are first made FP32

template <int kind>
void product(const Matrix& m, int64_t first, int64_t last, const float* const* x, int64_t rows, float* y,
             int64_t y_stride) {
    if (kind != FP32 && rows >= DECODE_FROM) {
        const int64_t width = padded(m.inputs);
        thread_local std::vector<float> panel;
        if (int64_t(panel.size()) < 4 * width) panel.resize(4 * width);
        for (int64_t o = first; o < last; o += 4) {
            const int64_t n = last - o < 4 ? last - o : 4;
            for (int64_t i = 0; i < n; ++i) decode<kind>(m, o + i, panel.data() + i * width);
            const Matrix p{(const uint8_t*)panel.data(), nullptr, nullptr, n, width, 0, FP32, 0};
            product<FP32>(p, 0, n, x, rows, y + o, y_stride);
            if (kind == INT8)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t i = 0; i < n; ++i) y[r * y_stride + o + i] *= factor(m, o + i);
        }
        return;
    }
    int64_t o = first;
    if (rows == 1)
        for (; o + 8 <= last; o += 8) tile<kind, 8, 1>(m, o, x, y, y_stride);
    for (; o + 4 <= last; o += 4) rows_of<kind, 4>(m, o, x, rows, y, y_stride);
    for (; o < last; ++o) rows_of<kind, 1>(m, o, x, rows, y, y_stride);
}

// y[r, o] = sum over k of w[o, k] x[r][k] for outputs first to last.
inline void product(const Matrix& m, int64_t first, int64_t last, const float* const* x, int64_t rows, float* y,
                    int64_t y_stride) {
    switch (m.kind) {
        case FP32: return product<FP32>(m, first, last, x, rows, y, y_stride);
        case BF16: return product<BF16>(m, first, last, x, rows, y, y_stride);
        case INT8: return product<INT8>(m, first, last, x, rows, y, y_stride);
        case FP8: return product<FP8>(m, first, last, x, rows, y, y_stride);
        default: return product<INT4>(m, first, last, x, rows, y, y_stride);
    }
}

inline void decode(const Matrix& m, int64_t row, float* out) {
    switch (m.kind) {
        case FP32: return decode<FP32>(m, row, out);
        case BF16: return decode<BF16>(m, row, out);
        case INT8: return decode<INT8>(m, row, out);
        case FP8: return decode<FP8>(m, row, out);
        default: return decode<INT4>(m, row, out);
    }
}

}  // namespace dsv3
