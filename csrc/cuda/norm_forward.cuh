// h = residual + dropout(x + x_bias), then y of its norm: see norm.cu.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/sums.cuh"

namespace tfm::cuda {

struct NormForward {
    Matrix x, residual, y, h; // h: x itself where there is no residual
    Matrix x_bias, weight, bias;
    float* mean; // null: RMSNorm
    float* rstd;
    int64_t rows;
    int columns, team_warps;
    float eps, weight_offset;
    Width rounding; // of z before the weight
    Dropout dropout;
};

// Eight columns of h, stored where there is a residual, and as they are stored.
template <class Access>
__device__ Octet form_h(const NormForward& call, int64_t row, int column, int64_t seed, Octet value,
                        const Octet& residual) {
    const int left = call.columns - column;
    if (call.x_bias.data) {
        const Octet x_bias = Access::Any::load(call.x_bias, column, left);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] += x_bias[i];
    }
    if (call.dropout.seed)
        Keep(call.dropout, row, column / 8, seed).apply(value);
    if (!call.residual.data)
        return value;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        value[i] += residual[i];
    return Access::store(call.h, row * call.columns + column, value, left);
}

__device__ inline void add_squares(float& total, const Octet& value, float average, int left) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float centred = i < left ? value[i] - average : 0.0f;
        total += centred * centred;
    }
}

__device__ inline void add_values(float& total, const Octet& value) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        total += value[i];
}

template <class Access>
__device__ void store_y(const NormForward& call, int64_t row, int column, Octet value, float average, float inverse) {
    const int left = call.columns - column;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        value[i] = (value[i] - average) * inverse;
    if (call.rounding != Width::FLOAT) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] = call.rounding == Width::HALF ? rounded<__half>(value[i]) : rounded<__nv_bfloat16>(value[i]);
    }
    if (call.weight.data) {
        const Octet weight = Access::Any::load(call.weight, column, left);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] *= weight[i] + call.weight_offset;
    }
    if (call.bias.data) {
        const Octet bias = Access::Any::load(call.bias, column, left);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] += bias[i];
    }
    Access::store(call.y, row * call.columns + column, value, left);
}

// Each team normalises one row, OCTETS times eight columns a lane, which stay in registers.
template <class Access, int OCTETS>
__global__ void __launch_bounds__(512) norm_forward_kernel(const NormForward call) {
    Team team{call.team_warps, shared_memory<float2>()};
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / team.lanes()) + team.index();
    const int columns = row < call.rows ? call.columns : 0; // A team without a row only meets the others.
    const int first = 8 * team.lane(), step = 8 * team.lanes();
    const int64_t seed = seed_of(call.dropout);
    Octet value[OCTETS], residual[OCTETS];
#pragma unroll
    for (int o = 0; o < OCTETS; ++o) {
        const int column = first + o * step;
        value[o] = residual[o] = Octet{};
        if (column >= columns)
            continue;
        value[o] = Access::load(call.x, row * call.x.stride + column, columns - column);
        if (call.residual.data)
            residual[o] = Access::load(call.residual, row * call.residual.stride + column, columns - column);
    }
    float total = 0.0f, average = 0.0f;
#pragma unroll
    for (int o = 0; o < OCTETS; ++o) {
        const int column = first + o * step;
        if (column >= columns)
            continue;
        value[o] = form_h<Access>(call, row, column, seed, value[o], residual[o]);
        if (call.mean)
            add_values(total, value[o]);
        else
            add_squares(total, value[o], 0.0f, columns - column);
    }
    total = team.sum(total);
    if (call.mean) {
        average = total / call.columns;
        total = 0.0f;
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
            add_squares(total, value[o], average, columns - (first + o * step));
        total = team.sum(total);
    }
    const float inverse = rsqrtf(total / call.columns + call.eps);
    if (columns > 0 && team.lane() == 0) {
        call.rstd[row] = inverse;
        if (call.mean)
            call.mean[row] = average;
    }
#pragma unroll
    for (int o = 0; o < OCTETS; ++o)
        if (first + o * step < columns)
            store_y<Access>(call, row, first + o * step, value[o], average, inverse);
}

// Each block normalises one row, and reads h again for each pass; a thread reads what it wrote itself.
template <class Access>
__global__ void __launch_bounds__(512) long_norm_forward_kernel(const NormForward call) {
    Team team{call.team_warps, shared_memory<float2>()};
    const int64_t row = blockIdx.x;
    const int first = 8 * threadIdx.x, step = 8 * blockDim.x;
    const int64_t seed = seed_of(call.dropout);
    const auto load_h = [&](int column) {
        return Access::load(call.h, row * call.h.stride + column, call.columns - column);
    };
    float total = 0.0f, average = 0.0f;
    for (int column = first; column < call.columns; column += step) {
        const int left = call.columns - column;
        Octet value = Access::load(call.x, row * call.x.stride + column, left), residual{};
        if (call.residual.data)
            residual = Access::load(call.residual, row * call.residual.stride + column, left);
        value = form_h<Access>(call, row, column, seed, value, residual);
        if (call.mean)
            add_values(total, value);
        else
            add_squares(total, value, 0.0f, left);
    }
    total = team.sum(total);
    if (call.mean) {
        average = total / call.columns;
        total = 0.0f;
        for (int column = first; column < call.columns; column += step)
            add_squares(total, load_h(column), average, call.columns - column);
        total = team.sum(total);
    }
    const float inverse = rsqrtf(total / call.columns + call.eps);
    if (threadIdx.x == 0) {
        call.rstd[row] = inverse;
        if (call.mean)
            call.mean[row] = average;
    }
    for (int column = first; column < call.columns; column += step)
        store_y<Access>(call, row, column, load_h(column), average, inverse);
}

} // namespace tfm::cuda
