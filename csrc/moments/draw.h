// draw's moments are those of log_prob: the race between blocks (simd/race.h) takes the weights as
// they are added up.
#pragma once
#include "moments/log_prob.h"

namespace {

template <class T>
struct DrawMoments : LogProbMoments<T> {};

}  // namespace
