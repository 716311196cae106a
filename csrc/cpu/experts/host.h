// What the host parts of the mixture's forward and backward share: sizes, tiles and weights of a call.
#pragma once

#include "cpu/experts/call.h"
#include "cpu/integers.h"
#include "cpu/rows.h"
#include "operators/experts.h"

namespace tfm {

// Numbers that are written before they are read.
using Memory = std::unique_ptr<float[]>;

inline Memory memory(int64_t numbers) { return Memory(new float[numbers]); }

// A tensor's numbers in fp32, one after the other; null where there is none.
struct Floats32 {
    MaybeTensor tensor;

    explicit Floats32(const MaybeTensor& x) {
        if (x)
            tensor = torch::stable::contiguous(torch::stable::to(*x, ScalarType::Float));
    }

    const float* data() const { return data_of<float>(tensor); }
};

struct RoutedCall {
    Floats32 weights;
    Routed routed;
    std::vector<RowTile> tiles;
    std::vector<int64_t> first_tile;
    std::vector<const void*> firsts, seconds;
    bool narrow;

    // `rows` is x or dy, [T, H].
    template <class Arguments>
    RoutedCall(const Arguments& a, const Tensor& rows)
        : weights(a.weights), narrow(is_narrow(width_of(rows.scalar_type()))) {
        const Tensor& second = a.second[0];
        const int64_t columns = second.size(second.dim() - 1);
        routed = {
            .order = static_cast<const int32_t*>(a.order.const_data_ptr()),
            .place = static_cast<const int32_t*>(a.place.const_data_ptr()),
            .offsets = static_cast<const int32_t*>(a.offsets.const_data_ptr()),
            .weights = weights.data(),
            .tokens = rows.size(0),
            .places = a.weights.size(1),
            .experts = a.offsets.size(0) - 1,
            .depth = rows.size(1),
            .columns = columns,
            .width = a.gated ? 2 * columns : columns,
            .activation = activation_of(a.activation),
            .gated = a.gated,
        };
        firsts = addresses(a.first);
        seconds = addresses(a.second);
        first_tile.push_back(0);
        for (int64_t expert = 0; expert < routed.experts; ++expert) {
            const int64_t end = routed.offsets[expert + 1];
            for (int64_t first = routed.offsets[expert]; first < end; first += TILE)
                tiles.push_back({expert, first, std::min(TILE, end - first)});
            first_tile.push_back(static_cast<int64_t>(tiles.size()));
        }
    }

    ExpertWeights first() const { return {firsts.data(), narrow}; }
    ExpertWeights second() const { return {seconds.data(), narrow}; }

    // kernel(begin, end) over tasks: blocks of `features`, and for each all experts, which multiply to this depth.
    template <class Kernel>
    void for_blocks(int64_t features, int64_t depth, const Kernel& kernel) const {
        const int64_t rows_of_each = routed.offsets[routed.experts] / std::max<int64_t>(1, routed.experts) + 1;
        for_rows((features + BLOCK - 1) / BLOCK * routed.experts, depth * rows_of_each, kernel);
    }

private:
    // Of one tensor for all experts, or of one for each.
    std::vector<const void*> addresses(const std::vector<Tensor>& tensors) const {
        std::vector<const void*> found;
        if (tensors[0].dim() == 2) {
            for (const Tensor& x : tensors)
                found.push_back(x.const_data_ptr());
            return found;
        }
        const Tensor& all = tensors[0];
        const int64_t bytes = all.size(1) * all.size(2) * (narrow ? 2 : 4);
        for (int64_t expert = 0; expert < routed.experts; ++expert)
            found.push_back(static_cast<const char*>(all.const_data_ptr()) + expert * bytes);
        return found;
    }
};

} // namespace tfm
