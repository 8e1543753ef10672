// Products with INT8 and INT4 weights: whole sums of rounded activations, 128 inputs at a time, and their scales.
//
// The weights of 16 outputs lie beside each other, four inputs of each (ops/integers.py), so that a vector has a
// lane an output, memory is read front to back, and nothing is summed across lanes.
#pragma once
#include "matrix.h"

namespace dsv3 {

inline u16v load_bytes(const uint8_t* p) { u16v v; std::memcpy(&v, p, 64); return v; }

// Each lane of acc and four products: of a byte of w, unsigned, with one of x, signed, the same in all lanes.
inline i16v dot(i16v acc, u16v w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (i16v)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    // Bytes 0 and 2 as 16 bits, then 1 and 3. (The instruction for bytes would saturate.)
    const u16v even = w & 0x00FF00FFu, odd = (w >> 8) & 0x00FF00FFu;
    const __m256i x_even = _mm256_set1_epi32((int8_t(x) & 0xFFFF) | int8_t(x >> 16) * 65536);
    const __m256i x_odd = _mm256_set1_epi32((int8_t(x >> 8) & 0xFFFF) | int8_t(x >> 24) * 65536);
    __m256i halves[2], evens[2], odds[2];
    std::memcpy(halves, &acc, 64);
    std::memcpy(evens, &even, 64);
    std::memcpy(odds, &odd, 64);
    for (int i = 0; i < 2; ++i) {
        const __m256i four = _mm256_add_epi32(_mm256_madd_epi16(evens[i], x_even), _mm256_madd_epi16(odds[i], x_odd));
        halves[i] = _mm256_add_epi32(halves[i], four);
    }
    std::memcpy(&acc, halves, 64);
    return acc;
#else
    for (int j = 0; j < 4; ++j) acc += (i16v)((w >> (8 * j)) & 0xFFu) * int32_t(int8_t(x >> (8 * j)));
    return acc;
#endif
}

inline int32_t four(const int8_t* codes) { int32_t x; std::memcpy(&x, codes, 4); return x; }

constexpr int64_t AHEAD = 2048;  // bytes: the processor's own prefetching ends at a page's end

// B blocks of outputs, from output first on, for R rows.
template <int kind, int B, int R>
inline void blocks(const Matrix& m, int64_t first, int64_t last, const Row* x, float* y, int64_t y_stride) {
    const int64_t bytes = m.row_bytes(), per_block = m.row_scales(), b = first / LANES;
    const uint8_t* w = m.values + b * bytes;
    const float *scales = m.scales + b * per_block, *leasts = m.leasts + b * per_block;
    const int64_t wide = kind == INT4 ? m.group : TILE, end_of_all = padded(m.inputs, SPAN);
    v16 found[B][R] = {};
    for (int64_t begin = 0; begin < m.inputs; begin += wide) {
        const int64_t end = std::min(begin + wide, end_of_all);
        i16v whole[B][R];
        int32_t total[R] = {};
        for (int r = 0; r < R; ++r) {
            for (int64_t p = begin; p < begin + wide; p += PIECE) total[r] += x[r].sums[p / PIECE];
            for (int i = 0; i < B; ++i) whole[i][r] = i16v{} - (kind == INT8 ? 128 * total[r] : 0);
        }
        for (int64_t k = begin; k < end; k += kind == INT8 ? 4 : 8, w += 64) {
            for (int i = 0; i < B; ++i) {
                const u16v v = load_bytes(w + i * bytes);
                __builtin_prefetch(w + i * bytes + AHEAD);
                for (int r = 0; r < R; ++r) {
                    if constexpr (kind == INT8) {
                        whole[i][r] = dot(whole[i][r], v, four(x[r].codes + k));
                    } else {
                        whole[i][r] = dot(whole[i][r], v & 0x0F0F0F0Fu, four(x[r].codes + k));
                        whole[i][r] = dot(whole[i][r], (v >> 4) & 0x0F0F0F0Fu, four(x[r].codes + k + 4));
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            const float step = x[r].scales[begin / TILE];
            for (int i = 0; i < B; ++i) {
                if constexpr (kind == INT8) {
                    found[i][r] += to_float(whole[i][r]) * step;
                } else {
                    found[i][r] += to_float(whole[i][r]) * (load(scales + i * per_block) * step);
                    found[i][r] += load(leasts + i * per_block) * (step * total[r]);
                }
            }
        }
        if constexpr (kind == INT4) {
            scales += LANES;
            leasts += LANES;
        }
    }
    for (int i = 0; i < B; ++i, first += LANES) {
        for (int r = 0; r < R; ++r) {
            if constexpr (kind == INT8) found[i][r] *= load(scales + i * per_block);
            float* to = y + r * y_stride + first;
            if (last - first >= LANES) store(to, found[i][r]);
            else std::memcpy(to, &found[i][r], (last - first) * 4);
        }
    }
}

// B blocks of outputs, from output first on, for all rows.
template <int kind, int B>
inline void all_rows(const Matrix& m, int64_t first, int64_t last, const Row* x, int64_t rows, float* y,
                     int64_t y_stride) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) blocks<kind, B, 4>(m, first, last, x + r, y + r * y_stride, y_stride);
    for (; r + 2 <= rows; r += 2) blocks<kind, B, 2>(m, first, last, x + r, y + r * y_stride, y_stride);
    for (; r < rows; ++r) blocks<kind, B, 1>(m, first, last, x + r, y + r * y_stride, y_stride);
}

// Outputs first (a block's first) to last: two blocks at once, since each of a block's sums waits for the last.
template <int kind>
void integer_product(const Matrix& m, int64_t first, int64_t last, const Row* x, int64_t rows, float* y,
                     int64_t y_stride) {
    for (; first + LANES < last; first += 2 * LANES) all_rows<kind, 2>(m, first, last, x, rows, y, y_stride);
    if (first < last) all_rows<kind, 1>(m, first, last, x, rows, y, y_stride);
}

// Byte j of each lane as a number of INT8.
inline v16 number_of(u16v bytes, int j) { return to_float((i16v)((bytes >> (8 * j)) & 0xFFu) - 128); }

// The same with INT8 weights and activations that are not rounded, one row, from any output on.
inline void exact_product(const Matrix& m, int64_t first, int64_t count, const float* x, float* y) {
    for (int64_t b = first / LANES; b * LANES < first + count; ++b) {
        const uint8_t* w = m.values + b * m.row_bytes();
        v16 sums[4] = {};
        for (int64_t k = 0; k < m.inputs; k += 4, w += 64)
            for (int j = 0; j < 4; ++j) sums[j] += number_of(load_bytes(w), j) * x[k + j];
        const v16 found = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * load(m.scales + b * LANES);
        for (int64_t i = 0; i < LANES; ++i) {
            const int64_t o = b * LANES + i - first;
            if (o >= 0 && o < count) y[o] = found[i];
        }
    }
}

// y[k] = sum over n of x[n] w[first + n, k], for count outputs; INT8. y has room for a multiple of 4.
inline void exact_fold(const Matrix& m, int64_t first, int64_t count, const float* x, float* y) {
    const int64_t begin = first / LANES, blocks = ceil_div(first + count, LANES) - begin;
    thread_local std::vector<v16> scaled;
    scaled.assign(blocks, v16{});
    for (int64_t n = 0; n < count; ++n) {
        const int64_t o = first + n;
        scaled[o / LANES - begin][o % LANES] = x[n] * m.scales[o];
    }
    const uint8_t* w = m.values + begin * m.row_bytes();
    for (int64_t k = 0; k < m.inputs; k += 4, w += 64) {
        v16 sums[4] = {};
        for (int64_t b = 0; b < blocks; ++b) {
            const u16v bytes = load_bytes(w + b * m.row_bytes());
            for (int j = 0; j < 4; ++j) sums[j] += number_of(bytes, j) * scaled[b];
        }
        for (int j = 0; j < 4; ++j) y[k + j] = sum(sums[j]);
    }
}

}  // namespace dsv3
