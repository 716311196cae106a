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

inline TokenRows rows_of(const Tensor& x) { return {static_cast<const float*>(x.const_data_ptr()), x.stride(0)}; }

struct RoutedCall {
    Floats32 weights;
    Routed routed;
    std::vector<RowTile> tiles;
    std::vector<int64_t> first_tile;
    std::vector<const float*> first, second; // of each expert

    // `rows` is x or dy, [T, H].
    template <class Arguments>
    RoutedCall(const Arguments& a, const Tensor& rows) : weights(a.weights) {
        const int64_t columns = a.second[0].size(a.second[0].dim() - 1);
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
        first = addresses(a.first);
        second = addresses(a.second);
        first_tile.push_back(0);
        for (int64_t expert = 0; expert < routed.experts; ++expert) {
            const int64_t end = routed.offsets[expert + 1];
            for (int64_t row = routed.offsets[expert]; row < end; row += TILE)
                tiles.push_back({row, std::min(TILE, end - row)});
            first_tile.push_back(static_cast<int64_t>(tiles.size()));
        }
    }

    // kernel(begin, end) over tasks: blocks of `features`, and for each all experts, which multiply to this depth.
    template <class Kernel>
    void for_blocks(int64_t features, int64_t depth, const Kernel& kernel) const {
        const int64_t rows_of_each = routed.offsets[routed.experts] / routed.experts + 1;
        for_rows((features + BLOCK - 1) / BLOCK * routed.experts, depth * rows_of_each, kernel);
    }

private:
    // Of one tensor for all experts, or of one for each.
    std::vector<const float*> addresses(const std::vector<Tensor>& tensors) const {
        std::vector<const float*> found;
        const bool separate = tensors[0].dim() == 2;
        for (int64_t expert = 0; expert < routed.experts; ++expert) {
            const Tensor& x = tensors[separate ? expert : 0];
            const int64_t skipped = separate ? 0 : expert * x.size(1) * x.size(2);
            found.push_back(static_cast<const float*>(x.const_data_ptr()) + skipped);
        }
        return found;
    }
};

} // namespace tfm
