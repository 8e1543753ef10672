// Layers of the model for a few tokens at a time, each with its own place in the paged cache: what decoding
// runs. The specification is the model's own modules (model/layer.py) with serve/attention.py's absorbed form;
// the tests compare the two. A pass is bound by the bytes of the weights, so everything between two reads of
// weights stays here: no call a matrix, no tensor a sum.
//
// All threads walk through the layers together; a loop marked "omp for" ends in a barrier.
#include "formats.h"
#include "packed.h"

using namespace dsv3;

namespace {

constexpr int64_t OUTPUTS = 32;  // of a matrix, the unit of parallel work
constexpr int64_t KEYS = 32;     // of a sequence, at once; fixed, so that sums have one order
constexpr int64_t HEADS = 4;     // that read the same keys together

// Round the first n numbers of a row if that is what a matrix multiplies.
inline void round_for(const Matrix& m, const Row& x, int64_t n) {
    if (integral(m.kind)) round(x, 0, n);
}

// To be called by all threads: copy x, [rows, inputs], for a product with m.
void take(const float* x, const Matrix& m, const Rows& rows) {
    #pragma omp for schedule(static)
    for (size_t r = 0; r < rows.at.size(); ++r) {
        std::memcpy(rows[r], x + r * m.inputs, m.inputs * 4);
        round_for(m, rows.at[r], m.inputs);
    }
}

// One SwiGLU and the rows it works on: row i of the work is token tokens[first + i].
struct Job {
    Matrix gate, up, down;
    int64_t first, rows;
};

struct Item { int64_t job, begin, end; };

std::vector<Item> items(const std::vector<Job>& jobs, bool down) {
    std::vector<Item> found;
    for (int64_t j = 0; j < int64_t(jobs.size()); ++j) {
        const int64_t outputs = down ? jobs[j].down.outputs : jobs[j].gate.outputs;
        for (int64_t o = 0; o < outputs; o += TILE) found.push_back({j, o, std::min(o + TILE, outputs)});
    }
    return found;
}

// silu(gate) * up into gate.
inline void swiglu(float* gate, const float* up, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const v16 g = load(gate + i);
        store(gate + i, g / (1.0f + exp(-g)) * load(up + i));
    }
    if (i < n) {
        float a[16] = {}, b[16] = {};
        std::memcpy(a, gate + i, (n - i) * 4);
        std::memcpy(b, up + i, (n - i) * 4);
        const v16 g = load(a);
        store(a, g / (1.0f + exp(-g)) * load(b));
        std::memcpy(gate + i, a, (n - i) * 4);
    }
}

// To be called by all threads. hidden: room for every row's gate; out[row of the work] gets the result.
void swiglus(const std::vector<Job>& jobs, const std::vector<Item>& ups, const std::vector<Item>& downs,
             const Row* x, const Rows& hidden, float* out, int64_t width) {
    #pragma omp for schedule(dynamic)
    for (size_t i = 0; i < ups.size(); ++i) {
        const Item& item = ups[i];
        const Job& job = jobs[item.job];
        const int64_t n = item.end - item.begin;
        thread_local std::vector<float> up;
        if (int64_t(up.size()) < job.rows * n) up.resize(job.rows * n);
        product(job.gate, item.begin, item.end, x + job.first, job.rows, hidden[job.first], hidden.stride);
        product(job.up, item.begin, item.end, x + job.first, job.rows, up.data() - item.begin, n);
        for (int64_t r = 0; r < job.rows; ++r) {
            const Row& row = hidden.at[job.first + r];
            swiglu(row.numbers + item.begin, up.data() + r * n, n);
            if (integral(job.down.kind)) round(row, item.begin, item.end);
        }
    }
    #pragma omp for schedule(dynamic)
    for (size_t i = 0; i < downs.size(); ++i) {
        const Item& item = downs[i];
        const Job& job = jobs[item.job];
        product(job.down, item.begin, item.end, hidden.at.data() + job.first, job.rows, out + job.first * width,
                width);
    }
}

// Rows where experts' gates of several widths are kept: none may read beyond its own.
Rows hidden_rows(const std::vector<Job>& jobs, int64_t rows) {
    int64_t widest = 0;
    for (const Job& job : jobs) widest = std::max(widest, job.gate.outputs);
    Rows found(rows, widest);
    for (const Job& job : jobs)
        for (int64_t r = 0; r < job.rows; ++r)
            std::fill(found[job.first + r] + job.gate.outputs, found[job.first + r] + padded(job.gate.outputs), 0.0f);
    return found;
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
    v16 squares{};
    float rest = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) squares += load(x + i) * load(x + i);
    for (; i < n; ++i) rest += x[i] * x[i];
    const float inverse = 1.0f / std::sqrt((sum(squares) + rest) / n + eps);
    for (i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

// Turn pairs (x0, x1), (x2, x3), ... by angles given as cosine and sine.
void rotate(const float* x, const float* rotation, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 2) {
        const float even = x[i], odd = x[i + 1], c = rotation[i], s = rotation[i + 1];
        out[i] = even * c - odd * s;
        out[i + 1] = odd * c + even * s;
    }
}

}  // namespace

extern "C" {

// The same structures, field by field, are in ops/native/decode.py.
struct Layer {
    Matrix q_a, q, kv_a, kv_b, o;  // q_a without values: queries come straight from the hidden state
    Matrix gate, up, down, shared_gate, shared_up, shared_down, router;
    const float *input_norm, *q_norm, *kv_norm, *post_norm, *bias;
    uint8_t* cache;
    int64_t experts;  // 0: gate, up and down are a dense MLP
};

struct Shape {
    int64_t hidden, heads, nope, rope, value, latent, chosen, groups, kept, normalise, cache_kind;
    float eps, scale, routing_factor;
};

struct Batch {
    int64_t tokens;
    const float* rotation;  // [tokens, rope]: cosine and sine of each pair
    const int64_t* slots;   // the cache row of each token
    const int64_t* keys;    // the cache rows each token sees, its own last: counts[n] of them from begins[n] on
    const int64_t *begins, *counts;
};

}  // extern "C"

namespace {

constexpr int64_t FP8_ROWS = 2, FP8_TILE = 128;  // cache kinds: FP32, BF16 and this (serve/cache.py)
const Coder<4, 3> E4M3{448.0f};

int64_t row_bytes(const Shape& s) {
    const int64_t width = s.latent + s.rope;
    if (s.cache_kind == FP8_ROWS) return s.latent + 4 * ((s.latent + FP8_TILE - 1) / FP8_TILE) + 2 * s.rope;
    return width * (s.cache_kind == BF16 ? 2 : 4);
}

uint16_t to_bf16(float x) {
    const uint32_t u = bits(x);
    if (x != x) return 0x7FC0;
    return uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

void write_row(const Shape& s, uint8_t* row, const float* latent, const float* rope) {
    if (s.cache_kind == FP32) {
        std::memcpy(row, latent, s.latent * 4);
        std::memcpy(row + s.latent * 4, rope, s.rope * 4);
        return;
    }
    if (s.cache_kind == BF16) {
        uint16_t* out = (uint16_t*)row;
        for (int64_t i = 0; i < s.latent; ++i) out[i] = to_bf16(latent[i]);
        for (int64_t i = 0; i < s.rope; ++i) out[s.latent + i] = to_bf16(rope[i]);
        return;
    }
    uint8_t* scales = row + s.latent;
    for (int64_t first = 0; first < s.latent; first += FP8_TILE, scales += 4) {
        const int64_t last = std::min(first + FP8_TILE, s.latent);
        float amax = 0;
        for (int64_t i = first; i < last; ++i) amax = std::max(amax, std::fabs(latent[i]));
        const float scale = amax == 0 ? 1.0f : std::max(amax / E4M3.largest, 1.17549435e-38f);
        std::memcpy(scales, &scale, 4);
        for (int64_t i = first; i < last; ++i) row[i] = uint8_t(E4M3.encode(latent[i] / scale));
    }
    for (int64_t i = 0; i < s.rope; ++i, scales += 2) {
        const uint16_t code = to_bf16(rope[i]);
        std::memcpy(scales, &code, 2);
    }
}

void read_row(const Shape& s, const uint8_t* row, float* out) {
    const int64_t width = s.latent + s.rope;
    if (s.cache_kind == FP32) {
        std::memcpy(out, row, width * 4);
    } else if (s.cache_kind == BF16) {
        const uint16_t* in = (const uint16_t*)row;
        for (int64_t i = 0; i < width; ++i) out[i] = number(uint32_t(in[i]) << 16);
    } else {
        const uint8_t* rest = row + s.latent;
        for (int64_t first = 0; first < s.latent; first += FP8_TILE, rest += 4) {
            float scale;
            std::memcpy(&scale, rest, 4);
            for (int64_t i = first; i < std::min(first + FP8_TILE, s.latent); ++i) out[i] = E4M3.decode(row[i]) * scale;
        }
        for (int64_t i = 0; i < s.rope; ++i, rest += 2) {
            uint16_t code;
            std::memcpy(&code, rest, 2);
            out[s.latent + i] = number(uint32_t(code) << 16);
        }
    }
    std::fill(out + width, out + padded(width), 0.0f);
}

// What a thread needs for some heads of one token.
struct Scratch {
    std::vector<float> query, keys, scores, sums, most, total;
    void fit(const Shape& s) {
        const int64_t width = padded(s.latent + s.rope);
        query.assign(HEADS * width, 0.0f);
        keys.resize(KEYS * width);
        scores.resize(HEADS * KEYS);
        sums.resize(HEADS * padded(s.latent));
        most.resize(HEADS);
        total.resize(HEADS);
    }
};

// Heads first to last of one token: queries with positions, folded into latents; attention to the cache; values.
// q: [heads, nope + rope] as projected; out: [heads, value].
void attend(const Shape& s, const Layer& layer, const Batch& batch, int64_t token, int64_t first, int64_t last,
            const float* q, float* out, Scratch& t) {
    t.fit(s);
    const int64_t heads = last - first, width = s.latent + s.rope, stride = padded(width), wide = padded(s.latent);
    const int64_t depth = s.nope + s.value, bytes = row_bytes(s);
    Row queries[HEADS];
    for (int64_t h = 0; h < heads; ++h) {
        float* query = t.query.data() + h * stride;
        const float* from = q + (first + h) * (s.nope + s.rope);
        queries[h] = {query};
        fold(layer.kv_b, (first + h) * depth, s.nope, from, query);
        rotate(from + s.nope, batch.rotation + token * s.rope, s.rope, query + s.latent);
        for (int64_t i = 0; i < width; ++i) query[i] *= s.scale;
        t.most[h] = -INFINITY;
        t.total[h] = 0;
    }
    std::fill(t.sums.begin(), t.sums.end(), 0.0f);
    const int64_t* slots = batch.keys + batch.begins[token];
    for (int64_t begin = 0; begin < batch.counts[token]; begin += KEYS) {
        const int64_t n = std::min(KEYS, batch.counts[token] - begin);
        const int64_t* slot = slots + begin;
        const float* keys = t.keys.data();
        int64_t run = 1;
        while (run < n && slot[run] == slot[run - 1] + 1) ++run;
        if (run == n && s.cache_kind == FP32 && width == stride) {
            keys = (const float*)(layer.cache + slot[0] * bytes);
        } else {
            for (int64_t i = 0; i < n; ++i) read_row(s, layer.cache + slot[i] * bytes, t.keys.data() + i * stride);
        }
        const Matrix rows{(const uint8_t*)keys, nullptr, nullptr, n, stride, 0, FP32, 0};
        product(rows, 0, n, queries, heads, t.scores.data(), KEYS);
        for (int64_t h = 0; h < heads; ++h) {
            float* score = t.scores.data() + h * KEYS;
            float most = t.most[h];
            for (int64_t i = 0; i < n; ++i) most = std::max(most, score[i]);
            for (int64_t i = n; i < KEYS; ++i) score[i] = -INFINITY;
            for (int64_t i = 0; i < KEYS; i += 16) {
                v16 e = load(score + i) - most;
                e = load(score + i) == -INFINITY ? v16{} : exp(e);
                store(score + i, e);
            }
            if (most > t.most[h]) {
                const float less = t.most[h] == -INFINITY ? 0.0f : std::exp(t.most[h] - most);
                float* sums = t.sums.data() + h * wide;
                for (int64_t c = 0; c < s.latent; ++c) sums[c] *= less;
                t.total[h] *= less;
                t.most[h] = most;
            }
            t.total[h] += sum(load(score) + load(score + 16));
        }
        for (int64_t c = 0; c < s.latent; c += 32) {
            v16 low[HEADS], high[HEADS];
            for (int64_t h = 0; h < heads; ++h) {
                low[h] = load(t.sums.data() + h * wide + c);
                high[h] = load(t.sums.data() + h * wide + c + 16);
            }
            for (int64_t i = 0; i < n; ++i) {
                const v16 a = load(keys + i * stride + c), b = load(keys + i * stride + c + 16);
                for (int64_t h = 0; h < heads; ++h) {
                    low[h] += a * t.scores[h * KEYS + i];
                    high[h] += b * t.scores[h * KEYS + i];
                }
            }
            for (int64_t h = 0; h < heads; ++h) {
                store(t.sums.data() + h * wide + c, low[h]);
                store(t.sums.data() + h * wide + c + 16, high[h]);
            }
        }
    }
    for (int64_t h = 0; h < heads; ++h) {
        float* sums = t.sums.data() + h * wide;
        for (int64_t c = 0; c < s.latent; ++c) sums[c] /= t.total[h];
        std::fill(sums + s.latent, sums + wide, 0.0f);  // parts of a key's rope are there
        exact(layer.kv_b, (first + h) * depth + s.nope, s.value, {sums}, out + (first + h) * s.value);
    }
}

// The experts of one token: the best of score plus bias within the best groups; ties go to the first.
void choose(const Shape& s, const Layer& layer, const float* logits, int64_t* chosen, float* gates) {
    const int64_t experts = layer.experts, size = experts / s.groups;
    std::vector<float> score(experts), biased(experts), of_group(s.groups);
    for (int64_t e = 0; e < experts; ++e) {
        score[e] = 1.0f / (1.0f + std::exp(-logits[e]));
        biased[e] = score[e] + layer.bias[e];
    }
    if (s.kept < s.groups) {
        for (int64_t g = 0; g < s.groups; ++g) {
            float best = -INFINITY, second = -INFINITY;
            for (int64_t e = g * size; e < (g + 1) * size; ++e) {
                if (biased[e] > best) { second = best; best = biased[e]; }
                else if (biased[e] > second) second = biased[e];
            }
            of_group[g] = best + second;
        }
        std::vector<int64_t> order(s.groups);
        for (int64_t g = 0; g < s.groups; ++g) order[g] = g;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of_group[a] > of_group[b]; });
        for (int64_t i = s.kept; i < s.groups; ++i)
            std::fill(biased.begin() + order[i] * size, biased.begin() + (order[i] + 1) * size, -INFINITY);
    }
    float total = 0;
    for (int64_t k = 0; k < s.chosen; ++k) {
        const int64_t best = std::max_element(biased.begin(), biased.end()) - biased.begin();
        chosen[k] = best;
        biased[best] = -INFINITY;
    }
    std::sort(chosen, chosen + s.chosen);
    for (int64_t k = 0; k < s.chosen; ++k) total += gates[k] = score[chosen[k]];
    for (int64_t k = 0; k < s.chosen; ++k) gates[k] *= s.routing_factor / (s.normalise ? total + 1e-20f : 1.0f);
}

// Which rows go through which experts, the shared ones as one more job.
struct Work {
    std::vector<Job> jobs;
    std::vector<Item> ups, downs;
    std::vector<int64_t> row_of;    // of token n and its k-th expert
    std::vector<Row> x;             // of every row of the work
    Rows hidden;
    std::unique_ptr<float[]> out;

    void plan(const Shape& s, const Layer& layer, int64_t tokens, const std::vector<int64_t>& chosen, const Rows& u) {
        jobs.clear();
        x.clear();
        int64_t rows = 0;
        if (layer.experts) {
            std::vector<int64_t> counts(layer.experts), next(layer.experts);
            for (int64_t e : chosen) ++counts[e];
            for (int64_t e = 0; e < layer.experts; ++e) {
                next[e] = rows;
                if (counts[e]) jobs.push_back({layer.gate.at(e), layer.up.at(e), layer.down.at(e), rows, counts[e]});
                rows += counts[e];
            }
            x.resize(rows);
            row_of.resize(rows);
            for (int64_t i = 0; i < rows; ++i) {
                row_of[i] = next[chosen[i]]++;
                x[row_of[i]] = u.at[i / s.chosen];
            }
        }
        const bool dense = !layer.experts;
        if (dense || layer.shared_gate.values) {
            if (dense) jobs.push_back({layer.gate, layer.up, layer.down, rows, tokens});
            else jobs.push_back({layer.shared_gate, layer.shared_up, layer.shared_down, rows, tokens});
            for (int64_t n = 0; n < tokens; ++n) x.push_back(u.at[n]);
            rows += tokens;
        }
        ups = items(jobs, false);
        downs = items(jobs, true);
        hidden = hidden_rows(jobs, rows);
        out.reset(new float[rows * s.hidden]);
    }
};

}  // namespace

extern "C" {

// y = x W^T; x: [rows, inputs].
void dsv3_linear(const Matrix* m, const float* x, int64_t rows, float* y, int threads) {
    const Rows in(rows, m->inputs);
    #pragma omp parallel num_threads(threads)
    {
        take(x, *m, in);
        #pragma omp for schedule(static)
        for (int64_t o = 0; o < m->outputs; o += OUTPUTS)
            product(*m, o, std::min(o + OUTPUTS, m->outputs), in.at.data(), rows, y, m->outputs);
    }
}

// The SwiGLU of each expert for its rows; x: [rows, inputs], sorted by expert, counts[e] of them for expert e.
void dsv3_experts(const Matrix* gate, const Matrix* up, const Matrix* down, int64_t experts, const int64_t* counts,
                  const float* x, float* y, int threads) {
    std::vector<Job> jobs;
    int64_t rows = 0;
    for (int64_t e = 0; e < experts; rows += counts[e++])
        if (counts[e]) jobs.push_back({gate->at(e), up->at(e), down->at(e), rows, counts[e]});
    const std::vector<Item> ups = items(jobs, false), downs = items(jobs, true);
    const Rows in(rows, gate->inputs), hidden = hidden_rows(jobs, rows);
    #pragma omp parallel num_threads(threads)
    {
        take(x, *gate, in);
        swiglus(jobs, ups, downs, in.at.data(), hidden, y, down->outputs);
    }
}

// x: [tokens, hidden], the states before the first layer; after the last one and the norm when this returns.
void dsv3_layers(const Layer* layers, int64_t count, const Shape* shape, const Batch* batch, const float* norm,
                 float* x, int threads) {
    const Shape& s = *shape;
    const int64_t tokens = batch->tokens, queries = s.heads * (s.nope + s.rope), width = s.latent + s.rope;
    const int64_t bytes = row_bytes(s), per_token = (s.heads + HEADS - 1) / HEADS;
    int64_t most_experts = 0, q_rank = 0;
    for (int64_t l = 0; l < count; ++l) {
        most_experts = std::max(most_experts, layers[l].experts);
        q_rank = std::max(q_rank, layers[l].q_a.values ? layers[l].q_a.outputs : 0);
    }
    const Rows u(tokens, s.hidden), q_latent(tokens, q_rank), heads(tokens, s.heads * s.value);
    std::vector<float> q_a(tokens * q_rank), kv(tokens * width), q(tokens * queries), added(tokens * s.hidden);
    std::vector<float> logits(tokens * most_experts), gates(tokens * s.chosen);
    std::vector<int64_t> chosen(tokens * s.chosen);
    Work work;
    #pragma omp parallel num_threads(threads)
    {
        for (int64_t l = 0; l < count; ++l) {
            const Layer& layer = layers[l];
            const int64_t rank = layer.q_a.values ? layer.q_a.outputs : 0;
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < tokens; ++n) {
                rms_norm(x + n * s.hidden, layer.input_norm, s.hidden, s.eps, u[n]);
                round_for(layer.kv_a, u.at[n], s.hidden);
            }
            const int64_t q_blocks = (rank + OUTPUTS - 1) / OUTPUTS, kv_blocks = (width + OUTPUTS - 1) / OUTPUTS;
            #pragma omp for schedule(static)
            for (int64_t b = 0; b < q_blocks + kv_blocks; ++b) {
                const bool is_q = b < q_blocks;
                const Matrix& m = is_q ? layer.q_a : layer.kv_a;
                const int64_t o = (is_q ? b : b - q_blocks) * OUTPUTS;
                product(m, o, std::min(o + OUTPUTS, m.outputs), u.at.data(), tokens, is_q ? q_a.data() : kv.data(),
                        m.outputs);
            }
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < tokens; ++n) {
                if (rank) {
                    rms_norm(&q_a[n * rank], layer.q_norm, rank, s.eps, q_latent[n]);
                    round_for(layer.q, q_latent.at[n], rank);
                }
                float* latent = &kv[n * width];
                rms_norm(latent, layer.kv_norm, s.latent, s.eps, latent);
                rotate(latent + s.latent, batch->rotation + n * s.rope, s.rope, latent + s.latent);
                write_row(s, layer.cache + batch->slots[n] * bytes, latent, latent + s.latent);
            }
            #pragma omp for schedule(static)
            for (int64_t o = 0; o < queries; o += OUTPUTS)
                product(layer.q, o, std::min(o + OUTPUTS, queries), (rank ? q_latent : u).at.data(), tokens, q.data(),
                        queries);
            #pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < per_token * tokens; ++i) {  // tokens of the same heads follow each other
                thread_local Scratch scratch;
                const int64_t n = i % tokens, first = i / tokens * HEADS;
                const int64_t last = std::min(first + HEADS, s.heads);
                attend(s, layer, *batch, n, first, last, &q[n * queries], heads[n], scratch);
            }
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < tokens; ++n) round_for(layer.o, heads.at[n], s.heads * s.value);
            #pragma omp for schedule(static)
            for (int64_t o = 0; o < s.hidden; o += OUTPUTS) {
                const int64_t last = std::min(o + OUTPUTS, s.hidden);
                product(layer.o, o, last, heads.at.data(), tokens, added.data(), s.hidden);
                for (int64_t n = 0; n < tokens; ++n)
                    for (int64_t i = o; i < last; ++i) x[n * s.hidden + i] += added[n * s.hidden + i];
            }
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < tokens; ++n) {
                rms_norm(x + n * s.hidden, layer.post_norm, s.hidden, s.eps, u[n]);
                round_for(layer.gate, u.at[n], s.hidden);
            }
            if (layer.experts) {
                #pragma omp for schedule(static)
                for (int64_t o = 0; o < layer.experts; o += OUTPUTS)
                    product(layer.router, o, std::min(o + OUTPUTS, layer.experts), u.at.data(), tokens, logits.data(),
                            layer.experts);
                #pragma omp for schedule(static)
                for (int64_t n = 0; n < tokens; ++n)
                    choose(s, layer, &logits[n * layer.experts], &chosen[n * s.chosen], &gates[n * s.chosen]);
            }
            #pragma omp single
            work.plan(s, layer, tokens, chosen, u);
            swiglus(work.jobs, work.ups, work.downs, work.x.data(), work.hidden, work.out.get(), s.hidden);
            const bool shared = !layer.experts || layer.shared_gate.values;
            const int64_t routed = layer.experts ? tokens * s.chosen : 0;
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < tokens; ++n) {
                float* to = x + n * s.hidden;
                for (int64_t k = 0; k < (layer.experts ? s.chosen : 0); ++k) {
                    const float* from = work.out.get() + work.row_of[n * s.chosen + k] * s.hidden;
                    const float gate = gates[n * s.chosen + k];
                    for (int64_t i = 0; i < s.hidden; ++i) to[i] += gate * from[i];
                }
                if (shared) {
                    const float* from = work.out.get() + (routed + n) * s.hidden;
                    for (int64_t i = 0; i < s.hidden; ++i) to[i] += from[i];
                }
            }
        }
        #pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; ++n) rms_norm(x + n * s.hidden, norm, s.hidden, s.eps, x + n * s.hidden);
    }
}

}  // extern "C"
