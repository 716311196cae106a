// The gradients of norm_forward.cuh: see norm.cu.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/sums.cuh"

namespace tfm::cuda {

struct NormBackward {
    Matrix dy, dh, h, dx, dresidual, weight;
    const float* mean;
    const float* rstd;
    float* partials; // [blocks, parts, columns] of dbias, dx_bias and dweight, those that are wanted
    int64_t rows;
    int columns, team_warps;
    bool dbias, dx_bias, dweight;
    float weight_offset;
    Dropout dropout;
};

// Of eight columns: the weight of g, and z where h was loaded.
template <class Access>
__device__ Octet weight_of(const NormBackward& call, int column) {
    Octet weight;
    if (call.weight.data)
        weight = Access::Any::load(call.weight, column, call.columns - column);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        weight[i] = call.weight.data ? weight[i] + call.weight_offset : 1.0f;
    return weight;
}

__device__ inline void normalise(Octet& h, float average, float inverse) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        h[i] = (h[i] - average) * inverse;
}

// Adds g to x and g · z to y.
__device__ inline void add_products(float2& sums, const Octet& dy, const Octet& z, const Octet& weight) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float g = dy[i] * weight[i];
        sums.x += g;
        sums.y += g * z[i];
    }
}

// Stores eight columns of dresidual and dx, and returns dx; `means` are those of g, 0 for RMSNorm, and of g · z.
template <class Access>
__device__ Octet store_gradients(const NormBackward& call, int64_t row, int column, int64_t seed, const Octet& dy,
                                 const Octet& z, const Octet& weight, float2 means, float inverse) {
    const int left = call.columns - column;
    Octet gradient;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        gradient[i] = (dy[i] * weight[i] - (means.x + z[i] * means.y)) * inverse;
    if (call.dh.data) {
        const Octet dh = Access::load(call.dh, row * call.dh.stride + column, left);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            gradient[i] += dh[i];
    }
    if (call.dresidual.data)
        Access::store(call.dresidual, row * call.columns + column, gradient, left);
    if (call.dropout.seed && (call.dx.data || call.dx_bias))
        Keep(call.dropout, row, column / 8, seed).apply(gradient);
    if (call.dx.data)
        Access::store(call.dx, row * call.columns + column, gradient, left);
    return gradient;
}

// Adds what the block's teams have summed, in order, and stores it.
template <int OCTETS>
__device__ void store_sums(const Octet (&sums)[OCTETS], const Team& team, float* teams_sums, float* to, int columns) {
    const int teams = blockDim.x / team.lanes(), width = 8 * OCTETS * team.lanes();
#pragma unroll
    for (int o = 0; o < OCTETS; ++o)
        store_vectors(teams_sums + team.index() * width + 8 * (o * team.lanes() + team.lane()), sums[o]);
    __syncthreads();
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        float total = 0.0f;
        for (int other = 0; other < teams; ++other)
            total += teams_sums[other * width + column];
        to[column] = total;
    }
    __syncthreads();
}

// Teams stride over the rows, OCTETS times eight columns a lane.
template <class Access, int OCTETS>
__global__ void __launch_bounds__(256, Access::BLOCKS) norm_backward_kernel(const NormBackward call) {
    float2* const slots = shared_memory<float2>();
    Team team{call.team_warps, slots};
    const int teams = blockDim.x / team.lanes();
    const int first = 8 * team.lane(), step = 8 * team.lanes();
    const int64_t seed = seed_of(call.dropout);
    Octet dweight[OCTETS]{}, dbias[OCTETS]{}, dx_bias[OCTETS]{};
    for (int64_t rows = static_cast<int64_t>(blockIdx.x) * teams; rows < call.rows;
         rows += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = rows + team.index();
        const int columns = row < call.rows ? call.columns : 0;
        const float average = columns > 0 && call.mean ? call.mean[row] : 0.0f;
        const float inverse = columns > 0 ? call.rstd[row] : 0.0f;
        Octet dy[OCTETS], z[OCTETS];
        float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o) {
            const int column = first + o * step;
            if (column >= columns)
                continue;
            dy[o] = Access::load(call.dy, row * call.dy.stride + column, columns - column);
            z[o] = Access::load(call.h, row * call.h.stride + column, columns - column);
        }
#pragma unroll
        for (int o = 0; o < OCTETS; ++o) {
            const int column = first + o * step;
            if (column >= columns)
                continue;
            normalise(z[o], average, inverse);
            add_products(sums, dy[o], z[o], weight_of<Access>(call, column));
        }
        sums = team.sum(sums);
        const float2 means = make_float2(call.mean ? sums.x / call.columns : 0.0f, sums.y / call.columns);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o) {
            const int column = first + o * step;
            if (column >= columns)
                continue;
            const Octet dx = store_gradients<Access>(call, row, column, seed, dy[o], z[o],
                                                     weight_of<Access>(call, column), means, inverse);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                dweight[o][i] += dy[o][i] * z[o][i];
                dbias[o][i] += dy[o][i];
                dx_bias[o][i] += dx[i];
            }
        }
    }

    float* const teams_sums = reinterpret_cast<float*>(slots) + Team::bytes(blockDim.x) / sizeof(float);
    float* to =
        call.partials + static_cast<int64_t>(blockIdx.x) * (call.dbias + call.dx_bias + call.dweight) * call.columns;
    const auto store = [&](const Octet(&sums)[OCTETS]) {
        store_sums(sums, team, teams_sums, to, call.columns);
        to += call.columns;
    };
    if (call.dbias)
        store(dbias);
    if (call.dx_bias)
        store(dx_bias);
    if (call.dweight)
        store(dweight);
}

// Blocks stride over the rows, and read dy and h twice; a block's sums lie in memory, where no other block adds.
template <class Access>
__global__ void __launch_bounds__(512, 1) long_norm_backward_kernel(const NormBackward call) {
    Team team{call.team_warps, shared_memory<float2>()};
    const int first = 8 * threadIdx.x, step = 8 * blockDim.x;
    const int64_t seed = seed_of(call.dropout);
    float* const partials =
        call.partials + static_cast<int64_t>(blockIdx.x) * (call.dbias + call.dx_bias + call.dweight) * call.columns;
    for (int64_t row = blockIdx.x; row < call.rows; row += gridDim.x) {
        const float average = call.mean ? call.mean[row] : 0.0f, inverse = call.rstd[row];
        Octet dy, z, weight;
        const auto load = [&](int column) {
            dy = Access::load(call.dy, row * call.dy.stride + column, call.columns - column);
            z = Access::load(call.h, row * call.h.stride + column, call.columns - column);
            weight = weight_of<Access>(call, column);
            normalise(z, average, inverse);
        };
        float2 sums = make_float2(0.0f, 0.0f);
        for (int column = first; column < call.columns; column += step) {
            load(column);
            add_products(sums, dy, z, weight);
        }
        sums = team.sum(sums);
        const float2 means = make_float2(call.mean ? sums.x / call.columns : 0.0f, sums.y / call.columns);
        for (int column = first; column < call.columns; column += step) {
            load(column);
            const Octet dx = store_gradients<Access>(call, row, column, seed, dy, z, weight, means, inverse);
            Matrix sums_row{partials, Width::FLOAT, 0};
            const auto add = [&](Octet term) {
                const int left = call.columns - column;
                if (row != blockIdx.x) {
                    const Octet before = Access::Any::load(sums_row, column, left);
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        term[i] += before[i];
                }
                Access::Any::store(sums_row, column, term, left);
                sums_row.data = static_cast<float*>(sums_row.data) + call.columns;
            };
            if (call.dbias)
                add(dy);
            if (call.dx_bias)
                add(dx);
            if (call.dweight) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    z[i] *= dy[i];
                add(z);
            }
        }
    }
}

} // namespace tfm::cuda
