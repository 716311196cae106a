// The gradients of what is added to scores: sums of ds over all scores that share an element.
//
//     dbias = Σ ds              over the sequences, heads and queries along which the bias is broadcast
//     drelative_bias = Σ ds     over the sequences, and the queries and keys as far apart
//
// The backward adds its ds up as it forms them. Sequences are cut into parts by their number alone; a part's are added
// one after the other, by the one thread that has them, into sums of its own, and the parts' in the end, in their
// order: the same bits on any number of threads.
#pragma once

#include "cpu/attention/call.h"

namespace tfm {

struct BiasSums {
    float* dense;    // [parts, heads or, where these share it, key heads, rows, row]; null: not wanted
    float* relative; // [parts, heads, width]; null: not wanted
    int64_t each;    // sequences of a part
    int64_t rows;    // 1 where all queries share one
    int64_t row;     // numbers from one to the next, whole vectors
    bool shares_heads;
};

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/vector.h"

namespace tfm::TFM_ISA {

// Where the ds of one head are added.
struct HeadSums {
    float* dense;       // of its first query; null: not wanted
    int64_t dense_step; // to the next query's
    float* relative;    // of the distance -farthest; null: not wanted
    int64_t farthest;

    // Of a task's head, zeros where the task is the first to add there.
    HeadSums(const Attention& call, const BiasSums& sums, const Task& task, int64_t head)
        : dense(nullptr), dense_step(sums.rows > 1 ? sums.row : 0), relative(nullptr),
          farthest(call.relative_bias.farthest) {
        const int64_t part = task.sequence / sums.each,
                      heads = sums.shares_heads ? call.heads / call.group : call.heads;
        const bool is_first = task.sequence % sums.each == 0;
        if (sums.dense) {
            const int64_t size = sums.rows * sums.row;
            dense = sums.dense + (part * heads + (sums.shares_heads ? task.head : head)) * size;
            if (is_first && (!sums.shares_heads || head == task.head * call.group))
                for (int64_t i = 0; i < size; i += WIDTH)
                    store(dense + i, Floats{});
        }
        if (sums.relative) {
            relative = sums.relative + (part * call.heads + head) * call.relative_bias.width();
            for (int64_t i = 0; is_first && i < call.relative_bias.width(); ++i)
                relative[i] = 0.0f;
        }
    }

    bool are_wanted() const { return dense || relative; }

    // Adds the ds of one query and `keys` keys from `first` on, 0 up to whole vectors, of which the first is `distance`
    // from the query's position.
    void add(const float* ds, int64_t query, int64_t first, int64_t keys, int64_t distance) const {
        if (dense) {
            float* const at = dense + query * dense_step + first;
            for (int64_t key = 0; key < keys; key += WIDTH)
                store(at + key, load(at + key) + load(ds + key));
        }
        if (relative)
            add_distances(ds, keys, distance);
    }

private:
    void add_distances(const float* ds, int64_t keys, int64_t distance) const {
        const int64_t begin = smaller(larger(-farthest - distance, 0), keys);
        const int64_t end = larger(smaller(farthest + 1 - distance, keys), begin);
        float nearer = 0.0f, farther = 0.0f;
        for (int64_t key = 0; key < begin; ++key)
            nearer += ds[key];
        float* const at = relative + farthest + distance;
        for (int64_t key = begin; key < end; ++key)
            at[key] += ds[key];
        for (int64_t key = end; key < keys; ++key)
            farther += ds[key];
        relative[0] += nearer;
        relative[2 * farthest] += farther;
    }
};

} // namespace tfm::TFM_ISA

#endif
