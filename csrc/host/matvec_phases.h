// Products with the covariance in two phases over the atoms (simd/matvec_phases.h), for the queries
// that allow it.
#pragma once
#include "host/cut.h"

namespace dfk {

// Adds up the moments of the queries in high noise, where there are many, but for the mean: sums of
// t are given as 0, and those of <t, v> t are about the mean of <t, v>. Takes these queries out of
// the cut. At most 31 MiB are kept between the phases. Returns a status.
int add_in_phases(Cut<float>& work, const Moments<float>& m);

}  // namespace dfk
