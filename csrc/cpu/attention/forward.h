// What the two forwards of attention share: forward.cpp takes tiles of queries, few_queries.cpp one after the other.
#pragma once

#include "cpu/attention/call.h"

namespace tfm {

struct AttentionForward {
    Attention attention;
    Heads output;
    RowStatistics statistics;
};

// Fills the results of a call that has_few_queries, of so many sequences.
void attend_few_queries(const AttentionForward& forward, int64_t sequences);

} // namespace tfm

#ifdef TFM_ISA

#include "cpu/attention/softmax.h"

namespace tfm::TFM_ISA {

// No score below it is a number: a difference from it is one, or -inf.
constexpr float LOWEST = -__FLT_MAX__;

} // namespace tfm::TFM_ISA

#endif
