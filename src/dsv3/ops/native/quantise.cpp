// Quantisation by tiles on a CPU, one pass over the numbers. The specification is ops/blocks.py in PyTorch;
// the tests compare every bit.
//
// A matrix is cut into segments of rows (experts, or one segment), each into row tiles. A row tile is the unit
// of parallel work. Within it: magnitudes' maxima column by column, then by groups of tile_columns, then the
// numbers.
#include <vector>

#include "formats.h"

using namespace dsv3;

namespace {

// Twelve-bit codes go by way of ``codes`` (room for n + 1), so that only the moving of bytes is not vectorised.
template <int E, int M>
inline void store(const Coder<E, M>& coder, const float* v, uint8_t* out, uint32_t* codes, int64_t n) {
    if constexpr (1 + E + M == 8) {
        for (int64_t i = 0; i < n; ++i) out[i] = uint8_t(coder.encode(v[i]));
    } else {
        for (int64_t i = 0; i < n; ++i) codes[i] = coder.encode(v[i]);
        codes[n] = 0;
        for (int64_t i = 0; i < n; i += 2, out += 3) {
            const uint32_t pair = codes[i] | (codes[i + 1] << 12);
            out[0] = uint8_t(pair); out[1] = uint8_t(pair >> 8); out[2] = uint8_t(pair >> 16);
        }
    }
}

template <int E, int M>
inline void fetch(const Coder<E, M>& coder, const uint8_t* in, float* v, uint32_t* codes, int64_t n) {
    if constexpr (1 + E + M == 8) {
        for (int64_t i = 0; i < n; ++i) v[i] = coder.decode(in[i]);
    } else {
        for (int64_t i = 0; i < n; i += 2, in += 3) {
            const uint32_t pair = in[0] | (uint32_t(in[1]) << 8) | (uint32_t(in[2]) << 16);
            codes[i] = pair & 0xFFF; codes[i + 1] = pair >> 12;
        }
        for (int64_t i = 0; i < n; ++i) v[i] = coder.decode(codes[i]);
    }
}

struct Job { int64_t row, rows, tile; };  // first row, number of rows, index of the row of scales

std::vector<Job> jobs(const int64_t* counts, int64_t segments, int64_t tile_rows) {
    std::vector<Job> found;
    int64_t row = 0, tile = 0;
    for (int64_t s = 0; s < segments; ++s)
        for (int64_t left = counts[s]; left > 0; left -= tile_rows, ++tile) {
            const int64_t rows = left < tile_rows ? left : tile_rows;
            found.push_back({row, rows, tile});
            row += rows;
        }
    return found;
}

template <int E, int M>
void quantise(const float* x, uint8_t* values, float* scales, const int64_t* counts, int64_t segments,
              int64_t columns, int64_t tile_rows, int64_t tile_columns, float largest, int power_of_two,
              float smallest_amax, int threads) {
    const Coder<E, M> coder{largest};
    const std::vector<Job> work = jobs(counts, segments, tile_rows);
    const int64_t across = (columns + tile_columns - 1) / tile_columns;
    const int64_t bytes = (1 + E + M == 8) ? columns : 3 * ((columns + 1) / 2);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<uint32_t> maxima(columns), codes(columns + 1);
        std::vector<float> scale(columns), scaled(columns);
        #pragma omp for schedule(static)
        for (size_t j = 0; j < work.size(); ++j) {
            const Job job = work[j];
            uint32_t* m = maxima.data();
            float *s = scale.data(), *t = scaled.data();
            std::memset(m, 0, columns * 4);
            for (int64_t r = 0; r < job.rows; ++r) {
                const float* row = x + (job.row + r) * columns;
                for (int64_t c = 0; c < columns; ++c) {  // as integers, so that NaN is the largest of all
                    const uint32_t u = bits(row[c]) & 0x7FFFFFFFu;
                    m[c] = u > m[c] ? u : m[c];
                }
            }
            for (int64_t k = 0; k < across; ++k) {
                const int64_t first = k * tile_columns;
                const int64_t last = first + tile_columns < columns ? first + tile_columns : columns;
                uint32_t top = 0;
                for (int64_t c = first; c < last; ++c) top = m[c] > top ? m[c] : top;
                float amax = number(top), value;
                if (smallest_amax == 0) value = amax == 0 ? 1.0f : amax / largest;
                else value = (amax < smallest_amax ? smallest_amax : amax) / largest;
                value = value < 1.17549435e-38f ? 1.17549435e-38f : value;
                if (power_of_two && top < 0x7F800000u)
                    value = number((bits(value) + 0x7FFFFFu) & 0x7F800000u);
                scales[job.tile * across + k] = value;
                for (int64_t c = first; c < last; ++c) s[c] = value;
            }
            for (int64_t r = 0; r < job.rows; ++r) {
                const float* row = x + (job.row + r) * columns;
                for (int64_t c = 0; c < columns; ++c) t[c] = row[c] / s[c];
                store(coder, t, values + (job.row + r) * bytes, codes.data(), columns);
            }
        }
    }
}

template <int E, int M>
void dequantise(const uint8_t* values, const float* scales, float* out, const int64_t* counts,
                int64_t segments, int64_t columns, int64_t tile_rows, int64_t tile_columns, int threads) {
    const Coder<E, M> coder{0};
    const std::vector<Job> work = jobs(counts, segments, tile_rows);
    const int64_t across = (columns + tile_columns - 1) / tile_columns;
    const int64_t bytes = (1 + E + M == 8) ? columns : 3 * ((columns + 1) / 2);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> scale(columns);
        std::vector<uint32_t> codes(columns + 1);
        #pragma omp for schedule(static)
        for (size_t j = 0; j < work.size(); ++j) {
            const Job job = work[j];
            float* s = scale.data();
            for (int64_t k = 0, c = 0; k < across; ++k)
                for (; c < (k + 1) * tile_columns && c < columns; ++c) s[c] = scales[job.tile * across + k];
            for (int64_t r = 0; r < job.rows; ++r) {
                float* row = out + (job.row + r) * columns;
                fetch(coder, values + (job.row + r) * bytes, row, codes.data(), columns);
                for (int64_t c = 0; c < columns; ++c) row[c] *= s[c];
            }
        }
    }
}

}  // namespace

extern "C" {

// kind: bits of exponent times ten plus bits of mantissa (43, 52, 56). Returns 0, or 1 for another kind.
int dsv3_quantise(int kind, const float* x, uint8_t* values, float* scales, const int64_t* counts,
                  int64_t segments, int64_t columns, int64_t tile_rows, int64_t tile_columns, float largest,
                  int power_of_two, float smallest_amax, int threads) {
    switch (kind) {
        case 43: quantise<4, 3>(x, values, scales, counts, segments, columns, tile_rows, tile_columns, largest,
                                power_of_two, smallest_amax, threads); return 0;
        case 52: quantise<5, 2>(x, values, scales, counts, segments, columns, tile_rows, tile_columns, largest,
                                power_of_two, smallest_amax, threads); return 0;
        case 56: quantise<5, 6>(x, values, scales, counts, segments, columns, tile_rows, tile_columns, largest,
                                power_of_two, smallest_amax, threads); return 0;
    }
    return 1;
}

int dsv3_dequantise(int kind, const uint8_t* values, const float* scales, float* out, const int64_t* counts,
                    int64_t segments, int64_t columns, int64_t tile_rows, int64_t tile_columns, int threads) {
    switch (kind) {
        case 43: dequantise<4, 3>(values, scales, out, counts, segments, columns, tile_rows, tile_columns,
                                  threads); return 0;
        case 52: dequantise<5, 2>(values, scales, out, counts, segments, columns, tile_rows, tile_columns,
                                  threads); return 0;
        case 56: dequantise<5, 6>(values, scales, out, counts, segments, columns, tile_rows, tile_columns,
                                  threads); return 0;
    }
    return 1;
}

}
