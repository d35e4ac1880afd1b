// An index of a cloud as pointers into its tensors: dfkernels/certified/index.py says what they
// are.
#pragma once
#include <cstdint>

namespace dfk {

struct Index {
  const float *centre, *basis, *axis_scale;
  const int16_t* coarse_codes;
  const int8_t* fine_codes;
  const float *atom_norm, *code_scale, *remainder_norm, *axis_error;
  double axis_skew, radius, coordinate_norm, remote_distance;
  int64_t remote_count;
  int64_t N, d, K;
  int64_t padded;  // length of a row of fine_codes, 0 without a fine level

  bool has_codes(int64_t atom) const { return code_scale[atom] != 0; }
  // Masked when the index was built; other atoms without codes are remote.
  bool knows_nothing(int64_t atom) const { return !has_codes(atom) && atom_norm[atom] == 0; }
};

}  // namespace dfk
