// Weights as they are kept (ops/packed.py), and the rows of activations they are multiplied with.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "formats.h"
#include "vectors.h"

namespace dsv3 {

constexpr int64_t BLOCK = 128;                    // FP8: a scale for 128 x 128 (ops/blocks.py)
constexpr int64_t LANES = 16, SPAN = 8;           // INT8, INT4: outputs in a block, inputs are filled up
constexpr int64_t TILE = 128, PIECE = 32;         // activations with one scale, and with one sum
constexpr float SMALLEST_AMAX = 1e-30f;           // all as in ops/integers.py

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t padded(int64_t n, int64_t to = 32) { return ceil_div(n, to) * to; }

enum Kind : int64_t { FP32, BF16, INT8, INT4, FP8 };
constexpr int BITS[] = {32, 16, 8, 4, 8};
inline bool integral(int64_t kind) { return kind == INT8 || kind == INT4; }

// [outputs, inputs], or a stack of such (experts). The same in Python's ctypes.
struct Matrix {
    const uint8_t* values;
    const float *scales, *leasts;
    int64_t outputs, inputs, group, kind;
    int64_t skipped;  // outputs before the first, in their first block (FP8)

    // Bytes of an output; of a block of them for INT8 and INT4.
    int64_t row_bytes() const {
        return (integral(kind) ? LANES * padded(inputs, SPAN) : inputs) * BITS[kind] / 8;
    }
    // Scales of an output (of a block of them for FP8, INT8 and INT4).
    int64_t row_scales() const {
        if (kind == INT4) return LANES * ceil_div(inputs, group);
        return kind == FP8 ? ceil_div(inputs, BLOCK) : kind == INT8 ? LANES : 0;
    }
    // Matrix e of a stack.
    Matrix at(int64_t e) const {
        const int64_t rows = integral(kind) ? ceil_div(outputs, LANES) : outputs;
        return moved(e * rows, e * (kind == FP8 ? ceil_div(outputs, BLOCK) : rows));
    }
    // What begins at one of its outputs: of INT8 and INT4 at a block's first.
    Matrix from(int64_t first) const {
        const int64_t row = integral(kind) ? first / LANES : first;
        Matrix m = moved(row, kind == FP8 ? (skipped + first) / BLOCK : row);
        m.skipped = (skipped + first) % BLOCK;
        return m;
    }

  private:
    Matrix moved(int64_t rows, int64_t rows_of_scales) const {
        Matrix m = *this;
        m.values += rows * row_bytes();
        if (scales) m.scales += rows_of_scales * row_scales();
        if (leasts) m.leasts += rows_of_scales * row_scales();
        return m;
    }
};

// A row of activations: FP32, filled up with zeros to a multiple of 32; and, for INT8 and INT4, rounded.
struct Row {
    float* numbers;
    float* scales;  // of every 128 codes
    int32_t* sums;  // of every 32 codes
    int8_t* codes;  // filled up with zeros to a multiple of 128
};

// Round numbers from begin (a multiple of 128) to before end, as ops/integers.py's rounded() does.
inline void round(const Row& x, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += TILE) {
        const int64_t n = std::min(TILE, end - k);
        const float* in = x.numbers + k;
        int8_t* out = x.codes + k;
        uint32_t most = bits(SMALLEST_AMAX);  // as whole numbers magnitudes keep their order, and a NaN is the greatest
        for (int64_t i = 0; i < n; ++i) most = std::max(most, bits(in[i]) & 0x7FFFFFFFu);
        const float amax = number(most), inverse = 127.0f / amax;
        const bool finite = most < 0x7F800000u;
        x.scales[k / TILE] = finite ? amax / 127.0f : NAN;
        std::fill(out + (finite ? n : 0), out + TILE, 0);
        if (finite)
            for (int64_t i = 0; i < n; ++i) out[i] = int8_t(int32_t(std::rint(in[i] * inverse)));
        for (int64_t i = 0; i < TILE; i += PIECE) {
            int32_t total = 0;
            for (int64_t j = i; j < i + PIECE; ++j) total += out[j];
            x.sums[(k + i) / PIECE] = total;
        }
    }
}

// Rows of equally many numbers.
class Rows {
    std::unique_ptr<float[]> numbers, scales;
    std::unique_ptr<int32_t[]> sums;
    std::unique_ptr<int8_t[]> codes;

  public:
    int64_t stride = 0;
    std::vector<Row> at;
    Rows() = default;
    Rows(int64_t rows, int64_t width) : stride(padded(width)), at(rows) {
        const int64_t tiles = ceil_div(width, TILE), pieces = tiles * TILE / PIECE;
        numbers.reset(new float[rows * stride]);
        scales.reset(new float[rows * tiles]);
        sums.reset(new int32_t[rows * pieces]);
        codes.reset(new int8_t[rows * tiles * TILE]);
        for (int64_t r = 0; r < rows; ++r) {
            at[r] = {&numbers[r * stride], &scales[r * tiles], &sums[r * pieces], &codes[r * tiles * TILE]};
            std::fill(at[r].numbers + width, at[r].numbers + stride, 0.0f);
        }
    }
    float* operator[](int64_t r) const { return at[r].numbers; }
};

}  // namespace dsv3
