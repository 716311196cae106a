// Masked softmax attention of few queries for CPUs, forward: of the one that a model generates with, or a few to
// verify.
//
// A task is a (sequence, head); those in a row that share a key head, of a query head's group, share a pass over its
// keys and one over its values, and take turns at a tile of them while that lies in the cache. Keys and values are read
// where they lie. The scores of a query stay whole in scratch memory, so that nothing is rescaled.
//
// What comes of a row depends on its place alone, never on the thread or on whom it shares a pass with: the same bits
// on any number of threads.
#include "cpu/isa.h"

#include "cpu/attention/forward.h"

namespace tfm {

namespace {

struct FewScratch : Carver<Attention> {
    const int64_t most_rows = call.group * call.longest_query;
    int64_t query = carve(*this, most_rows, call.dim);
    int64_t scores = carve(*this, most_rows, call.longest_key + WORD_KEYS);
    int64_t sums = carve(*this, most_rows, call.value_dim);
    int64_t tops = carve(*this, 1, most_rows);
    // Two floats an address.
    int64_t keys = carve(*this, 2, call.longest_key + WORD_KEYS);
    int64_t values = carve(*this, 2, call.longest_key + WORD_KEYS);
};

} // namespace

TFM_KERNEL(attention_few_queries, const AttentionForward& call, const Task* tasks, int64_t begin, int64_t end,
           float* scratch)

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/extra_score.h"

namespace tfm::TFM_ISA {

namespace {

// The bits of the keys from `first` on, a multiple of WORD_KEYS, that are in `seen` and that somebody attends to.
TFM_INLINE uint32_t reached_word(const Reached& reached, int64_t first) {
    const int64_t begin = larger(reached.seen.begin - first, 0), end = smaller(reached.seen.end - first, WORD_KEYS);
    uint32_t bits = begin < end ? (~0u >> (WORD_KEYS - end)) & (~0u << begin) : 0;
    bits &= reached.words ? static_cast<uint32_t>(reached.words[first / WORD_KEYS]) : ~0u;
    return bits & (reached.keys ? static_cast<uint32_t>(reached.keys[first / WORD_KEYS]) : ~0u);
}

// Where the keys and values from `first` on lie, of a head's first row. In the place of those that nobody attends to
// stands the one before, or the first: what lies there is not read, and a weight of 0 is multiplied by a number.
// Returns the end of the keys, `first` where nobody attends to any.
int64_t list_places(const Attention& call, const Reached& reached, int64_t first, int64_t* keys, int64_t* values) {
    int64_t last = -1;
    for (int64_t word = first; word < reached.seen.end; word += WORD_KEYS) {
        const uint32_t bits = reached_word(reached, word);
        if (last < 0 && bits == 0)
            continue;
        if (last < 0) {
            last = word + __builtin_ctz(bits);
            for (int64_t key = first; key < word; ++key)
                keys[key - first] = last * call.key.row, values[key - first] = last * call.value.row;
        }
        int64_t *const to_keys = keys + word - first, *const to_values = values + word - first;
        for (int64_t i = 0; bits == ~0u && i < WORD_KEYS; ++i)
            to_keys[i] = (word + i) * call.key.row, to_values[i] = (word + i) * call.value.row;
        for (int64_t i = 0; bits != ~0u && i < WORD_KEYS; ++i) {
            last = (bits >> i) & 1 ? word + i : last;
            to_keys[i] = last * call.key.row, to_values[i] = last * call.value.row;
        }
        last = bits == ~0u ? word + WORD_KEYS - 1 : last;
    }
    return last < 0 ? first : reached.seen.end;
}

class FewQueries {
public:
    FewQueries(const AttentionForward& forward, float* scratch)
        : forward(forward), call(forward.attention), at{call}, query(scratch + at.query), scores(scratch + at.scores),
          sums(scratch + at.sums), tops(scratch + at.tops), keys(reinterpret_cast<int64_t*>(scratch + at.keys)),
          values(reinterpret_cast<int64_t*>(scratch + at.values)), listed(nullptr), first_key(0), end(0) {}

    // Attends with `heads` heads from the task's on, which share a key head.
    template <class T>
    void attend(const Task& task, int64_t heads) {
        const Extent& extent = call.extents[task.sequence];
        list(task, extent);
        const int64_t key_head = task.head / call.group;
        const T* const key_rows = first_row<T>(call.key, task.sequence, key_head, extent.key_first);
        const T* const value_rows = first_row<T>(call.value, task.sequence, key_head, extent.key_first);
        const int64_t queries = extent.query_length, rows = heads * queries;
        const auto tile_of = [&](int64_t row) {
            return Tile{task.sequence, task.head + row / queries, row % queries, 1, first_key, 0, 0};
        };
        for (int64_t row = 0; row < rows; ++row) {
            const Tile tile = tile_of(row);
            const Heads& x = call.query;
            gather_row(x, tile.sequence * x.sequence + tile.head * x.head + (extent.query_first + tile.row) * x.row,
                       call.dim, query + row * padded(call.dim));
            tops[row] = LOWEST;
            for (int64_t column = 0; column < call.value_dim; column += WIDTH)
                store(sum_of(row) + column, Floats{});
        }
        for (int64_t first = first_key; first < end; first += BLOCK_KEYS)
            for (int64_t row = 0; row < rows; ++row) {
                Tile tile = tile_of(row);
                tile.key = first, tile.keys = smaller(BLOCK_KEYS, end - first);
                float* const numbers = scores_of(row) + first - first_key;
                const int64_t* const places = keys + first - first_key;
                score(
                    key_rows, [&](int64_t key) __attribute__((always_inline)) { return places[key]; }, tile.keys,
                    row == 0 ? end - first : 0, query + row * padded(call.dim), call.dim, call.inner, numbers);
                const float top = maximum(finish_scores<true>(call, tile, 0, numbers, nullptr));
                tops[row] = top > tops[row] ? top : tops[row];
            }
        for (int64_t row = 0; row < rows; ++row)
            tops[row] = weigh_row(tile_of(row), extent.query_first, scores_of(row), tops[row]);
        for (int64_t first = first_key; first < end; first += BLOCK_KEYS)
            for (int64_t row = 0; row < rows; ++row)
                weigh_values(value_rows, values + first - first_key, scores_of(row) + first - first_key,
                             smaller(BLOCK_KEYS, end - first), call.value_dim, sum_of(row));
        for (int64_t row = 0; row < rows; ++row) {
            const Tile tile = tile_of(row);
            // Without keys sums may be anything.
            for (int64_t column = 0; tops[row] == 0.0f && column < call.value_dim; column += WIDTH)
                store(sum_of(row) + column, Floats{});
            scatter(sum_of(row), tops[row], forward.output, tile.sequence, tile.head, extent.query_first + tile.row, 1,
                    call.value_dim);
        }
    }

private:
    const AttentionForward& forward;
    const Attention& call;
    const FewScratch at;
    float *query, *scores, *sums;
    float* tops; // of each row the largest score, in the end the factor of its sums
    int64_t *keys, *values;
    const Extent* listed; // the sequence whose keys are
    int64_t first_key, end;

    float* scores_of(int64_t row) const { return scores + row * padded(call.longest_key + WORD_KEYS); }
    float* sum_of(int64_t row) const { return sums + row * padded(call.value_dim); }

    template <class T>
    static const T* first_row(const Heads& x, int64_t sequence, int64_t head, int64_t first) {
        return static_cast<const T*>(x.data) + sequence * x.sequence + head * x.head + first * x.row;
    }

    // Once for a sequence, unless its heads have masks of their own.
    void list(const Task& task, const Extent& extent) {
        if (listed == &extent && call.reach.head == 0)
            return;
        const Span seen = visible_keys(call, extent, 0, extent.query_length);
        first_key = seen.begin / WORD_KEYS * WORD_KEYS;
        end = list_places(call, reached_keys(call, task.sequence, task.head, seen), first_key, keys, values);
        listed = &extent;
    }

    // Scores to weights, in place, and the statistics; returns the factor of the sums of values, 0 without keys.
    float weigh_row(const Tile& tile, int64_t first_query, float* numbers, float largest) const {
        Floats top = broadcast(largest), total{};
        for (int64_t key = 0; key < end - first_key; key += WIDTH) {
            const Floats weight = exp2((load(numbers + key) - top) * LOG2E);
            store(numbers + key, weight);
            total += weight;
        }
        total = broadcast(sum(total));
        const bool is_empty = total[0] == 0.0f;
        const Floats shrink = add_extra_score(call, tile.head, top, total);
        number_of(forward.statistics.tops, tile, first_query + tile.row) = is_empty ? -INFINITE : top[0];
        number_of(forward.statistics.logs, tile, first_query + tile.row) = is_empty ? 0.0f : log2(total)[0];
        return is_empty ? 0.0f : shrink[0] / total[0];
    }
};

} // namespace

void attention_few_queries(const AttentionForward& forward, const Task* tasks, int64_t begin, int64_t end,
                           float* scratch) {
    const Attention& call = forward.attention;
    FewQueries few(forward, scratch);
    for (int64_t task = begin, next; task < end; task = next) {
        const int64_t sequence = tasks[task].sequence, key_head = tasks[task].head / call.group;
        const auto is_shared = [&](const Task& other) {
            return call.reach.head == 0 && other.sequence == sequence && other.head / call.group == key_head;
        };
        for (next = task + 1; next < end && is_shared(tasks[next]);)
            ++next;
        call.key.narrow ? few.attend<BFloat16>(tasks[task], next - task) : few.attend<float>(tasks[task], next - task);
    }
}

} // namespace tfm::TFM_ISA

#else

#include "cpu/attention/host.h"

namespace tfm {

void attend_few_queries(const AttentionForward& forward, int64_t sequences) {
    const Attention& call = forward.attention;
    Tasks tasks;
    for (int64_t sequence = 0; sequence < sequences; ++sequence) {
        const Extent& extent = call.extents[sequence];
        const int64_t work = extent.query_length * seen_keys(call, extent, 0, extent.query_length);
        for (int64_t head = 0; head < call.heads && extent.query_length > 0; ++head)
            tasks.add({sequence, head, 0, 0}, work);
    }
    tasks.run(call.dim + call.value_dim, FewScratch{call}.floats,
              [&](const Task* all, int64_t begin, int64_t end, float* scratch) {
                  TFM_RUN(attention_few_queries, forward, all, begin, end, scratch);
              });
}

} // namespace tfm

#endif
