// Products with weights as they are kept: FP32, BF16, INT8 a channel and INT4 a group (ops/integers.py), FP8 in
// blocks of 128 x 128 (ops/blocks.py).
//
// Every sum over the inputs has one order, whatever is computed beside it: a token's numbers do not depend on
// how many tokens share the pass, nor on the number of threads.
#pragma once
#include "integers.h"
#include "matrix.h"

namespace dsv3 {

// What the scale of a block stands for in all lanes; FP8 only.
template <int kind> inline v16 level_of(const Matrix& m, int64_t row, int64_t k) {
    if constexpr (kind == FP8) return all(m.scales[(m.skipped + row) / BLOCK * m.row_scales() + k / BLOCK]);
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
    } else {
        low = e4m3(p) * level;
        high = e4m3(p + 16) * level;
    }
}

// A row as FP32, filled up with zeros to a multiple of 32.
template <int kind> inline void decode(const Matrix& m, int64_t row, float* out) {
    v16 level{};
    for (int64_t k = 0; k < m.inputs; k += 32) {
        v16 low, high;
        if (k % BLOCK == 0) level = level_of<kind>(m, row, k);
        numbers<kind>(m, row, k, m.inputs - k, level, low, high);
        store(out + k, low);
        store(out + k + 16, high);
    }
}

// O outputs of R rows.
template <int kind, int O, int R>
inline void tile(const Matrix& m, int64_t first, const Row* x, float* y, int64_t y_stride) {
    v16 sums[O][R] = {}, level[O];
    const int64_t wide = kind == FP8 ? BLOCK : m.inputs, ahead = O * m.row_bytes();
    for (int64_t begin = 0; begin < m.inputs; begin += wide) {
        for (int o = 0; o < O; ++o) level[o] = level_of<kind>(m, first + o, begin);
        const int64_t end = std::min(begin + wide, m.inputs);
        for (int64_t k = begin; k < end; k += 32) {
            v16 low[O], high[O];
            for (int o = 0; o < O; ++o) {
                if (kind != FP32) __builtin_prefetch(m.values + (first + o) * m.row_bytes() + ahead + k * BITS[kind] / 8);
                numbers<kind>(m, first + o, k, m.inputs - k, level[o], low[o], high[o]);
            }
            for (int r = 0; r < R; ++r) {
                const v16 a = load(x[r].numbers + k), b = load(x[r].numbers + k + 16);
                for (int o = 0; o < O; ++o) {
                    sums[o][r] += low[o] * a;
                    sums[o][r] += high[o] * b;
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < O; ++o) y[r * y_stride + first + o] = sum(sums[o][r]);
}

template <int kind, int O>
inline void rows_of(const Matrix& m, int64_t first, const Row* x, int64_t rows, float* y, int64_t y_stride) {
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
void product(const Matrix& m, int64_t first, int64_t last, const Row* x, int64_t rows, float* y,
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
        }
        return;
    }
    int64_t o = first;
    if (rows == 1)
        for (; o + 8 <= last; o += 8) tile<kind, 8, 1>(m, o, x, y, y_stride);
    for (; o + 4 <= last; o += 4) rows_of<kind, 4>(m, o, x, rows, y, y_stride);
    for (; o < last; ++o) rows_of<kind, 1>(m, o, x, rows, y, y_stride);
}

// y[r, o] = sum over k of w[o, k] x[r][k] for outputs first (of INT8 and INT4 a block's first) to last.
inline void product(const Matrix& m, int64_t first, int64_t last, const Row* x, int64_t rows, float* y,
                    int64_t y_stride) {
    switch (m.kind) {
        case FP32: return product<FP32>(m, first, last, x, rows, y, y_stride);
        case BF16: return product<BF16>(m, first, last, x, rows, y, y_stride);
        case FP8: return product<FP8>(m, first, last, x, rows, y, y_stride);
        case INT8: return integer_product<INT8>(m, first, last, x, rows, y, y_stride);
        default: return integer_product<INT4>(m, first, last, x, rows, y, y_stride);
    }
}

// y[i] = sum over k of w[first + i, k] x[k] for count outputs, x as it is; not with INT4.
inline void exact(const Matrix& m, int64_t first, int64_t count, const Row& x, float* y) {
    if (m.kind == INT8) return exact_product(m, first, count, x.numbers, y);
    product(m.from(first), 0, count, &x, 1, y, count);
}

template <int kind> void fold(const Matrix& m, int64_t first, int64_t count, const float* x, float* y) {
    thread_local std::vector<float> row;
    row.resize(padded(m.inputs));
    std::fill(y, y + m.inputs, 0.0f);
    for (int64_t n = 0; n < count; ++n) {
        decode<kind>(m, first + n, row.data());
        for (int64_t k = 0; k < m.inputs; ++k) y[k] += x[n] * row[k];
    }
}

// y[k] = sum over n of x[n] w[first + n, k] for count outputs; not with INT4. y has room for a multiple of 4.
inline void fold(const Matrix& m, int64_t first, int64_t count, const float* x, float* y) {
    switch (m.kind) {
        case FP32: return fold<FP32>(m, first, count, x, y);
        case BF16: return fold<BF16>(m, first, count, x, y);
        case FP8: return fold<FP8>(m, first, count, x, y);
        default: return exact_fold(m, first, count, x, y);
    }
}

}  // namespace dsv3
