// A pair of elements and the 2 x 2 matrix `[[d1, d2], [d3, d4]]` of a butterfly factor, real (C = 1) or complex (C = 2).
#pragma once
#include "common.cuh"

template <int C> struct Four {
  float w[4 * C];
  __device__ inline void load(const float *p) {
#pragma unroll
    for (int i = 0; i < C; i++) {
      const float4 v = __ldg((const float4 *)p + i);
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  }
  // (a, b) = (d1 a + d2 b, d3 a + d4 b)
  __device__ inline void apply(float (&a)[C], float (&b)[C]) const {
    if constexpr (C == 1) {
      const float p = a[0], q = b[0];
      a[0] = w[0] * p + w[1] * q, b[0] = w[2] * p + w[3] * q;
    } else {
      const float pr = a[0], pi = a[1], qr = b[0], qi = b[1];
      a[0] = w[0] * pr - w[1] * pi + w[2] * qr - w[3] * qi, a[1] = w[0] * pi + w[1] * pr + w[2] * qi + w[3] * qr;
      b[0] = w[4] * pr - w[5] * pi + w[6] * qr - w[7] * qi, b[1] = w[4] * pi + w[5] * pr + w[6] * qi + w[7] * qr;
    }
  }
  // Adds the gradient of the weights to `g`, for inputs (a, b) and gradients (da, db), which become those of the inputs.
  __device__ inline void back(const float (&a)[C], const float (&b)[C], float (&da)[C], float (&db)[C], float (&g)[4 * C]) const {
    if constexpr (C == 1) {
      const float p = da[0], q = db[0];
      g[0] += p * a[0], g[1] += p * b[0], g[2] += q * a[0], g[3] += q * b[0];
      da[0] = w[0] * p + w[2] * q, db[0] = w[1] * p + w[3] * q;
    } else {
      const float pr = da[0], pi = da[1], qr = db[0], qi = db[1];
      g[0] += pr * a[0] + pi * a[1], g[1] += pi * a[0] - pr * a[1];
      g[2] += pr * b[0] + pi * b[1], g[3] += pi * b[0] - pr * b[1];
      g[4] += qr * a[0] + qi * a[1], g[5] += qi * a[0] - qr * a[1];
      g[6] += qr * b[0] + qi * b[1], g[7] += qi * b[0] - qr * b[1];
      da[0] = w[0] * pr + w[1] * pi + w[4] * qr + w[5] * qi, da[1] = w[0] * pi - w[1] * pr + w[4] * qi - w[5] * qr;
      db[0] = w[2] * pr + w[3] * pi + w[6] * qr + w[7] * qi, db[1] = w[2] * pi - w[3] * pr + w[6] * qi - w[7] * qr;
    }
  }
};
