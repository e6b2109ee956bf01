"""Matrix products and attention on CPUs with AVX-512, written for the few rows of decoding.

Decoding multiplies one row, or the few that speculation judges, with every weight of the model: all
that counts is that weights stream in from the first byte to the last, and that what is done to them
keeps up. So each weight is stored anew, once, after loading: in *tiles* of 32 rows, a few columns
at a time. For prefill, which multiplies many rows, tile by tile becomes bf16. The C++ below wants
the bf16 instructions of AVX-512 (Intel Cooper Lake, Sapphire Rapids and newer; AMD Zen 4 and newer)
and is built once, by the first process that needs it. Without them, without a compiler or in other
dtypes `linear.py` uses torch's own operations.

Up to FEW_ROWS, what a row gives never depends on how many there are: all sums have one order.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 32  # up to here weights are decoded as they are multiplied; above, made floats once
SOURCE = r"""
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#define UNROLL _Pragma("GCC unroll 32")  // arrays of registers must have constant indices

using at::BFloat16;
using at::Tensor;

namespace {

constexpr int kTile = 32;        // rows of the weight in a tile: the lanes of two registers
constexpr int kAhead = 4096;     // bytes from what is read to what is fetched
constexpr int kPiece = 1 << 15;  // bytes of weights that are worth a thread

// What has one element for each half of a tile.
#define HALVES UNROLL for (int half = 0; half < 2; half++)
// What has one for each of M rows, or parts, in registers.
#define ROWS UNROLL for (int i = 0; i < M; i++)

void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kAhead, _MM_HINT_T0); }

__m512i load(const void* tile, int half) {
  return _mm512_loadu_si512(static_cast<const char*>(tile) + 64 * half);
}

__mmask16 first(int64_t n) { return n < 0 ? 0 : n < 16 ? (1u << n) - 1 : 0xffff; }

__m512 floats(const BFloat16* p, __mmask16 mask = 0xffff) {
  const auto words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return (__m512)_mm512_slli_epi32(words, 16);
}

void store(BFloat16* p, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// Call f(m, M) for the rows m to m + M, M a constant of at most kMost, until all rows are done.
template <int kMost, typename F>
void blocks_of_rows(int64_t rows, F f) {
  auto block = [&]<size_t... I>(int64_t m, int64_t M, std::index_sequence<I...>) {
    ((M == I + 1 ? f(m, std::integral_constant<int, I + 1>()) : void()), ...);
  };
  for (int64_t m = 0; m < rows; m += kMost)
    block(m, std::min<int64_t>(rows - m, kMost), std::make_index_sequence<kMost>());
}

// Rows of x in blocks of kMost: what a lane takes at once of each, 4 bytes, side by side [in, M].
template <int kMost>
std::vector<int> interleave(const void* x, int64_t rows, int64_t in) {
  std::vector<int> result(rows * in);
  at::parallel_for(0, (rows + kMost - 1) / kMost, 1, [&](int64_t begin, int64_t end) {
    const auto last = std::min(rows, end * kMost);
    blocks_of_rows<kMost>(last - begin * kMost, [&](int64_t m, auto M) {
      const auto from = static_cast<const int*>(x) + (begin * kMost + m) * in;
      const auto to = result.data() + (begin * kMost + m) * in;
      for (int64_t k = 0; k < in; k++) ROWS to[k * M + i] = from[i * in + k];
    });
  });
  return result;
}

// Call f(tile) for every tile of `bytes`, a thread for its tiles in the order of memory.
template <typename F>
void for_tiles(int64_t tiles, int64_t bytes, F f) {
  at::parallel_for(0, tiles, kPiece / bytes + 1, [&](int64_t tile, int64_t end) {
    for (; tile < end; tile++) f(tile);
  });
}

// x [rows, in], made dense, and room for y [rows, out].
struct Product {
  const int64_t rows, in, out;
  const Tensor x;
  Tensor y;

  Product(const Tensor& x, int64_t out, const Tensor& weight, int columns, at::ScalarType dtype)
      : rows(x.size(0)), in(x.size(1)), out(out), x(x.contiguous()),
        y(at::empty({rows, out}, x.options().dtype(dtype))) {
    TORCH_CHECK(weight.size(1) * columns == in && weight.size(0) == (out + kTile - 1) / kTile,
                "the weight has not been packed for x of ", in, " and y of ", out, " columns");
  }
};

// ---- bf16: tiles [in / 2, 32, 2] ----------------------------------------------------------------

// xs as interleave makes them of p.x; n is the tile's first row.
void multiply(const Product& p, const int* xs, const BFloat16* w, int64_t n) {
  auto y = static_cast<BFloat16*>(p.y.mutable_data_ptr());
  blocks_of_rows<12>(p.rows, [&](int64_t m, auto M) {
    auto x = xs + m * p.in / 2;
    __m512 sums[M][2];
    ROWS HALVES sums[i][half] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.in; k += 2, x += M) {
      const auto at = w + k * kTile;
      if (p.rows <= FEW_ROWS) fetch(at), fetch(at + kTile);
      const __m512bh ws[] = {(__m512bh)load(at, 0), (__m512bh)load(at, 1)};
      ROWS {
        const auto both = (__m512bh)_mm512_set1_epi32(x[i]);
        HALVES sums[i][half] = _mm512_dpbf16_ps(sums[i][half], ws[half], both);
      }
    }
    ROWS HALVES {
      const auto column = n + 16 * half;
      store(y + (m + i) * p.out + column, first(p.out - column), sums[i][half]);
    }
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, int64_t out) {
  Product p(x, out, weight, 2, at::kBFloat16);
  const auto xs = interleave<12>(p.x.const_data_ptr(), p.rows, p.in / 2);
  auto w = weight.const_data_ptr<BFloat16>();
  for_tiles(weight.size(0), p.in * kTile * 2, [&](int64_t tile) {
    multiply(p, xs.data(), w + tile * kTile * p.in, tile * kTile);
  });
  return p.y;
}

// For many rows. expand(tile, k, half) gives the floats of two columns from k on, in registers.
template <typename F>
void multiply_floats(const Product& p, int64_t tiles, F expand) {
  const auto xs = interleave<12>(p.x.const_data_ptr(), p.rows, p.in / 2);
  for_tiles(tiles, p.in * kTile, [&](int64_t tile) {
    thread_local std::vector<BFloat16> w;
    w.resize(p.in * kTile);
    for (int64_t k = 0; k < p.in; k += 2)
      for (int half = 0; half < 2; half++) {
        auto [even, odd] = expand(tile, k, half);
        auto bits = [](__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
        const auto pairs = _mm512_or_si512(bits(even), _mm512_slli_epi32(bits(odd), 16));
        _mm512_storeu_si512(w.data() + k * kTile + half * kTile, pairs);
      }
    multiply(p, xs.data(), w.data(), tile * kTile);
  });
}

// ---- int8: tiles [in / 4, 32, 4] ----------------------------------------------------------------

// The instruction multiplies unsigned with signed bytes, exactly. x: M rows of unsigned bytes, as
// interleave makes them. sums[M] becomes the sum of the weights alone.
template <int M>
void sum_up_int8(const int* x, int64_t in, const int8_t* w, __m512i (*to)[2]) {
  __m512i sums[M + 1][2];
  UNROLL for (int i = 0; i <= M; i++) HALVES sums[i][half] = _mm512_setzero_si512();
  for (int64_t k = 0; k < in; k += 4, x += M) {
    const auto at = w + k * kTile;
    fetch(at), fetch(at + 64);
    const __m512i ws[] = {load(at, 0), load(at, 1)};
    HALVES sums[M][half] = _mm512_dpbusd_epi32(sums[M][half], _mm512_set1_epi8(1), ws[half]);
    ROWS {
      const auto four = _mm512_set1_epi32(x[i]);
      HALVES sums[i][half] = _mm512_dpbusd_epi32(sums[i][half], four, ws[half]);
    }
  }
  UNROLL for (int i = 0; i <= M; i++) HALVES to[i][half] = sums[i][half];
}

// x int8, y int32.
Tensor int_mm(const Tensor& x, const Tensor& weight, int64_t out) {
  Product p(x.bitwise_xor(-128), out, weight, 4, at::kInt);  // raised by 128
  const auto xs = interleave<12>(p.x.const_data_ptr(), p.rows, p.in / 4);
  auto w = weight.const_data_ptr<int8_t>();
  auto y = p.y.mutable_data_ptr<int>();
  for_tiles(weight.size(0), p.in * kTile, [&](int64_t tile) {
    blocks_of_rows<12>(p.rows, [&](int64_t m, auto M) {
      __m512i sums[M + 1][2];
      sum_up_int8<M>(xs.data() + m * p.in / 4, p.in, w + tile * kTile * p.in, sums);
      ROWS HALVES {
        const auto n = tile * kTile + 16 * half;
        const auto sum = _mm512_sub_epi32(sums[i][half], _mm512_slli_epi32(sums[M][half], 7));
        _mm512_mask_storeu_epi32(y + (m + i) * out + n, first(out - n), sum);
      }
    });
  });
  return p.y;
}

// Rows of x as whole numbers of 24 bits, in units of `units`: lost is under 2^-22 of a row's
// largest, as it is when floats are added up. They are raised by 2^23 and cut into three rows of
// bytes, the high ones first.
struct Bytes {
  std::vector<uint8_t> rows;
  std::vector<float> units;

  explicit Bytes(const Product& p) : rows(p.rows * 3 * p.in), units(p.rows) {
    auto x = p.x.const_data_ptr<BFloat16>();
    auto to = rows.data();
    for (auto& unit : units) {
      int most = 0;  // the bits of the largest: the exponent, then seven more
      for (int64_t k = 0; k < p.in; k++) most = std::max<int>(most, x[k].x & 0x7fff);
      const int shift = 22 + 127 - std::max(most >> 7, 32);
      unit = most < 0x7f80 ? std::ldexp(1.f, -shift) : NAN;
      const auto scale = _mm512_set1_ps(std::ldexp(1.f, shift));
      for (int64_t k = 0; k < p.in; k += 16) {
        const auto mask = first(p.in - k);
        auto number = _mm512_cvttps_epi32(_mm512_mul_ps(floats(x + k, mask), scale));
        number = _mm512_add_epi32(number, _mm512_set1_epi32(1 << 23));
        for (int part = 0; part < 3; part++)
          _mm_mask_storeu_epi8(to + part * p.in + k, mask,
                               _mm512_cvtepi32_epi8(_mm512_srli_epi32(number, 16 - 8 * part)));
      }
      x += p.in, to += 3 * p.in;
    }
  }
};

Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scales) {
  const int64_t tiles = weight.size(0), out = scales.size(0);
  Product p(x, out, weight, 4, at::kBFloat16);
  auto w = weight.const_data_ptr<int8_t>();
  auto y = p.y.mutable_data_ptr<BFloat16>();
  auto scale = [&, s = scales.const_data_ptr<BFloat16>()](int64_t n) {
    return floats(s + n, first(out - n));
  };
  if (p.rows > FEW_ROWS) {
    multiply_floats(p, tiles, [&](int64_t tile, int64_t k, int half) {
      const auto n = tile * kTile + 16 * half;
      const auto codes = load(w + tile * kTile * p.in + k / 4 * 4 * kTile, half);
      auto value = [&](int column) {
        const auto code = _mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * column), 24);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale(n));
      };
      return std::pair(value(k % 4), value(k % 4 + 1));
    });
    return p.y;
  }
  const Bytes bytes(p);
  const auto xs = interleave<12>(bytes.rows.data(), p.rows * 3, p.in / 4);
  for_tiles(tiles, p.in * kTile, [&](int64_t tile) {
    blocks_of_rows<4>(p.rows, [&](int64_t m, auto M) {
      __m512i sums[3 * M + 1][2];
      sum_up_int8<3 * M>(xs.data() + m * 3 * p.in / 4, p.in, w + tile * kTile * p.in, sums);
      ROWS HALVES {
        const auto n = tile * kTile + 16 * half;
        auto part = [&](int j) { return sums[3 * i + j][half]; };
        const auto rise = _mm512_slli_epi32(sums[3 * M][half], 7);
        auto sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(part(0), rise));
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(part(1)));
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(part(2)));
        sum = _mm512_mul_ps(sum, _mm512_set1_ps(bytes.units[m + i]));
        store(y + (m + i) * out + n, first(out - n), _mm512_mul_ps(sum, scale(n)));
      }
    });
  });
  return p.y;
}

// ---- int4: tiles [in / 4, 32, 2], the first two columns in the low halves of the bytes ----------

const __m512i kValues = [] {
  std::array<BFloat16, 32> values;
  for (int i = 0; i < 32; i++) values[i] = i % 16 - 8;  // an index has five bits, a code four
  return _mm512_loadu_si512(values.data());
}();

struct Pairs {  // of columns: the codes as bf16
  __m512bh low, high;
  Pairs(const uint8_t* codes, int half) {
    const auto bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + half);
    const auto words = _mm512_cvtepu8_epi16(bytes);
    low = (__m512bh)_mm512_permutexvar_epi16(words, kValues);
    high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), kValues);
  }
};

// The even and the odd elements.
std::pair<__m512, __m512> split(__m512i pairs) {
  return {(__m512)_mm512_slli_epi32(pairs, 16),
          (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000))};
}

// x as interleave makes it; x_sums of the columns of each group, [M, groups].
template <int M>
void sum_up_int4(const int* x, const float* x_sums, int64_t in, const uint8_t* w,
                 const BFloat16* grid, int64_t groups, __m512 (*to)[2]) {
  __m512 sums[M][2];
  ROWS HALVES sums[i][half] = _mm512_setzero_ps();
  for (int64_t k = 0, group = 0; group < groups; group++) {
    __m512 parts[M][2];
    ROWS HALVES parts[i][half] = _mm512_setzero_ps();
    for (const int64_t end = (group + 1) * (in / groups); k < end; k += 4, w += 64, x += 2 * M) {
      fetch(w);
      const Pairs ws[] = {{w, 0}, {w, 1}};
      ROWS {
        const auto low = (__m512bh)_mm512_set1_epi32(x[i]);
        const auto high = (__m512bh)_mm512_set1_epi32(x[M + i]);
        HALVES parts[i][half] = _mm512_dpbf16_ps(parts[i][half], ws[half].low, low);
        HALVES parts[i][half] = _mm512_dpbf16_ps(parts[i][half], ws[half].high, high);
      }
    }
    HALVES {
      const auto [scale, zero] = split(load(grid + group * 2 * kTile, half));
      ROWS {
        const auto x_sum = _mm512_set1_ps(x_sums[i * groups + group]);
        sums[i][half] = _mm512_fmadd_ps(parts[i][half], scale, sums[i][half]);
        sums[i][half] = _mm512_fmadd_ps(x_sum, zero, sums[i][half]);
      }
    }
  }
  ROWS HALVES to[i][half] = sums[i][half];
}

// grid bf16 [tiles, groups, 32, 2]: scales and zeros.
Tensor linear_int4(const Tensor& x, const Tensor& weight, const Tensor& grid, int64_t out) {
  const int64_t tiles = weight.size(0), groups = grid.size(1);
  Product p(x, out, weight, 4, at::kBFloat16);
  const int64_t groupsize = p.in / groups;
  auto w = weight.const_data_ptr<uint8_t>();
  auto g = grid.const_data_ptr<BFloat16>();
  if (p.rows > FEW_ROWS) {
    multiply_floats(p, tiles, [&](int64_t tile, int64_t k, int half) {
      const auto at = g + (tile * groups + k / groupsize) * 2 * kTile;
      const auto [scale, zero] = split(load(at, half));
      const Pairs codes(w + (tile * p.in + k / 4 * 4) * kTile / 2, half);
      const auto [even, odd] = split((__m512i)(k % 4 ? codes.high : codes.low));
      return std::pair(_mm512_fmadd_ps(even, scale, zero), _mm512_fmadd_ps(odd, scale, zero));
    });
    return p.y;
  }
  const auto xs = interleave<6>(p.x.const_data_ptr(), p.rows, p.in / 2);
  std::vector<float> x_sums(p.rows * groups);
  for (int64_t i = 0; i < p.rows * groups; i++) {
    auto lanes = _mm512_setzero_ps();
    for (int64_t k = 0; k < groupsize; k += 16)
      lanes = _mm512_add_ps(lanes, floats(p.x.const_data_ptr<BFloat16>() + i * groupsize + k));
    x_sums[i] = _mm512_reduce_add_ps(lanes);
  }
  auto y = p.y.mutable_data_ptr<BFloat16>();
  for_tiles(tiles, p.in * kTile / 2, [&](int64_t tile) {
    blocks_of_rows<6>(p.rows, [&](int64_t m, auto M) {
      __m512 sums[M][2];
      sum_up_int4<M>(xs.data() + m * p.in / 2, x_sums.data() + m * groups, p.in,
                     w + tile * kTile / 2 * p.in, g + tile * groups * 2 * kTile, groups, sums);
      ROWS HALVES {
        const auto n = tile * kTile + 16 * half;
        store(y + (m + i) * out + n, first(out - n), sums[i][half]);
      }
    });
  });
  return p.y;
}

// ---- Attention ----------------------------------------------------------------------------------

// e^x = 2^n e^r, the latter by its Taylor series, whose remainder is under 2 in 10^7 of it.
__m512 exp(__m512 x) {
  const auto n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  auto r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  auto sum = _mm512_set1_ps(1.f / 720);
  for (float factor : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, n);
}

// Lane j of the result is the sum of the lanes of v[j].
__m512 sums_of_lanes(const __m512* v) {
  __m512 fours[4], eights[2];
  for (int i = 0; i < 4; i++, v += 4) {
    const auto a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const auto b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    fours[i] = (__m512)(_mm512_unpacklo_pd((__m512d)a, (__m512d)b)) +
               (__m512)(_mm512_unpackhi_pd((__m512d)a, (__m512d)b));
  }
  auto halve = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  for (int i = 0; i < 2; i++) eights[i] = halve(fours[2 * i], fours[2 * i + 1]);
  return halve(eights[0], eights[1]);
}

// softmax(q k / sqrt(D)) v of M queries, D = 32 P, that see the same `length` keys and values.
template <int M, int P>
void attend_to(const BFloat16* q, const BFloat16* k, const BFloat16* v, int64_t length,
               BFloat16* y) {
  constexpr int D = 32 * P;
  const int64_t room = (length + 15) / 16 * 16;
  thread_local std::vector<float> memory;
  memory.resize(M * room);
  float* const weights = memory.data();  // [M, room]
  __m512 most[M], total[M], sums[M][2 * P];
  ROWS most[i] = _mm512_set1_ps(-INFINITY), total[i] = _mm512_setzero_ps();
  ROWS UNROLL for (int part = 0; part < 2 * P; part++) sums[i][part] = _mm512_setzero_ps();
  for (int64_t j = 0; j < length; j += 16)
    ROWS {
      __m512 products[16];
      UNROLL for (int key = 0; key < 16; key++) {
        const auto at = k + (j + 16 <= length ? j + key : std::min(j + key, length - 1)) * D;
        products[key] = _mm512_setzero_ps();
        UNROLL for (int part = 0; part < P; part++)
          products[key] = _mm512_dpbf16_ps(
              products[key], (__m512bh)load(q + i * D, part), (__m512bh)load(at, part));
      }
      const auto score = sums_of_lanes(products) / std::sqrt(float(D));
      most[i] = _mm512_max_ps(most[i], score);  // what stands behind the last is the last again
      _mm512_storeu_ps(weights + i * room + j, score);
    }
  ROWS most[i] = _mm512_set1_ps(_mm512_reduce_max_ps(most[i]));
  for (int64_t j = 0; j < length; j += 16)
    ROWS {
      const auto score = _mm512_loadu_ps(weights + i * room + j);
      const auto weight = _mm512_maskz_mov_ps(first(length - j), exp(score - most[i]));
      _mm512_storeu_ps(weights + i * room + j, weight);
      total[i] += weight;
    }
  for (int64_t j = 0; j < length; j++)
    UNROLL for (int part = 0; part < 2 * P; part++) {
      const auto value = floats(v + j * D + 16 * part);
      ROWS sums[i][part] += weights[i * room + j] * value;
    }
  ROWS UNROLL for (int part = 0; part < 2 * P; part++)
    store(y + i * D + 16 * part, 0xffff, sums[i][part] / _mm512_reduce_add_ps(total[i]));
}

// q [B, T, heads, D], k and v [B, KV heads, S, D]; each query sees the positions up to its own, of
// positions [B, T]. Those at S - 1 are padding, whose result nobody reads. y [B, T, heads * D].
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions) {
  const int64_t T = q.size(1), heads = q.size(2), D = q.size(3), S = k.size(2);
  const int64_t kv_heads = k.size(1), group = heads / kv_heads;
  TORCH_CHECK(D % 32 == 0 && D <= 256 && k.is_contiguous() && v.is_contiguous());
  const auto qs = q.contiguous(), where = positions.contiguous();
  auto y = at::zeros({q.size(0), T, heads * D}, q.options());
  auto from = where.const_data_ptr<int64_t>();
  const auto longest = *std::max_element(from, from + where.numel()) + 1;
  const int64_t tasks = where.numel() * kv_heads;
  at::parallel_for(0, tasks, 2048 / (longest * group) + 1, [&](int64_t task, int64_t end) {
    for (; task < end; task++) {
      const int64_t row = task / kv_heads, length = from[row] + 1;
      if (length == S) continue;
      const int64_t cache = (row / T * kv_heads + task % kv_heads) * S * D;
      blocks_of_rows<8>(D / 32, [&](int64_t, auto P) {
        blocks_of_rows<std::max(8 / P, 1)>(group, [&](int64_t head, auto M) {
          const auto at = (task * group + head) * D;
          attend_to<M, P>(qs.const_data_ptr<BFloat16>() + at, k.const_data_ptr<BFloat16>() + cache,
                          v.const_data_ptr<BFloat16>() + cache, length,
                          y.mutable_data_ptr<BFloat16>() + at);
        });
      });
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(tokenbus, library) {
  library.def("linear(Tensor x, Tensor weight, int out) -> Tensor");
  library.def("linear_int8(Tensor x, Tensor weight, Tensor scales) -> Tensor");
  library.def("int_mm(Tensor x, Tensor weight, int out) -> Tensor");
  library.def("linear_int4(Tensor x, Tensor weight, Tensor grid, int out) -> Tensor");
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor positions) -> Tensor");
}

TORCH_LIBRARY_IMPL(tokenbus, CPU, library) {
  library.impl("linear", linear);
  library.impl("linear_int8", linear_int8);
  library.impl("int_mm", int_mm);
  library.impl("linear_int4", linear_int4);
  library.impl("attend", attend);
}
"""

FLAGS = f"-std=c++20 -O3 -fopenmp -DFEW_ROWS={FEW_ROWS} "
FLAGS += "-mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni"
NEEDED = {"fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}


def supported() -> bool:
    """Whether the CPU has the instructions."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):  # another system, or another architecture
        return False
    return NEEDED <= set(flags.split())


@functools.cache
def load() -> bool:
    """Make `torch.ops.tokenbus` ready, the first time by building it; whether that worked."""
    if not supported():
        return False
    what = "\n".join((SOURCE, FLAGS, torch.__version__))
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    library = folder / f"tokenbus_{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    try:
        if library.exists():
            torch.ops.load_library(library)
        else:
            build(library)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        advice = "g++ 10 or newer and the package ninja are needed"
        print(
            f"slower than it could be: no kernels for this CPU; {advice} ({reason})",
            file=sys.stderr,
        )
        return False
    shapes = {
        "linear": lambda x, weight, out: x.new_empty(len(x), out),
        "linear_int8": lambda x, weight, scales: x.new_empty(len(x), len(scales)),
        "int_mm": lambda x, weight, out: x.new_empty(len(x), out, dtype=torch.int32),
        "linear_int4": lambda x, weight, grid, out: x.new_empty(len(x), out),
        "attend": lambda q, k, v, positions: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]),
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"tokenbus::{name}", shape)
    return True


def build(library: Path) -> None:
    """Compile the kernels and load them; other processes see a whole file or none."""
    from torch.utils import cpp_extension  # takes a while to import

    print("building kernels for this CPU, once ...", file=sys.stderr)
    places = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent))
    os.environ["PATH"] = os.pathsep.join(places)  # pip puts ninja beside Python
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source = Path(folder) / "kernels.cpp"
        source.write_text(SOURCE)
        options = {"extra_cflags": FLAGS.split(), "build_directory": folder}
        cpp_extension.load(library.stem, str(source), is_python_module=False, **options)
        os.replace(Path(folder) / library.name, library)


def pack(weight: Tensor, columns: int) -> Tensor:
    """Tiles `[out/32, in/columns, 32, columns]` of a weight `[out, in]`, padded with zeros."""
    weight = F.pad(weight, (0, 0, 0, -len(weight) % 32))
    return weight.view(-1, 32, weight.shape[1] // columns, columns).transpose(1, 2).contiguous()


def pack_int4(weight: Tensor, scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of a weight stored as in `linear.Int4Linear`, codes and grid as for `linear_int4`."""
    a, b = weight.view(len(weight), -1, 2).unbind(-1)  # columns 0 and 1, columns 2 and 3
    codes = torch.stack((a >> 4 | b & 0xF0, a & 15 | b << 4), -1).flatten(1)
    grid = F.pad(scales_and_zeros, (0, 0, 0, -len(weight) % 32)).unflatten(1, (-1, 32))
    return pack(codes, 2), grid.transpose(0, 1).contiguous()
