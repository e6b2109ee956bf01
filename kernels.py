"""Matrix products and attention on CPUs with AVX-512, written for the few rows of decoding.

Decoding multiplies one row, or the few that speculation judges, with every weight of the model: all
that counts is that weights stream in from the first byte to the last, and that what is done to them
keeps up. So each weight is stored anew, once, after loading: in *tiles* of 32 rows, a few columns
at a time. For prefill, which multiplies many rows, tile by tile becomes bf16. Small models wait for
Python more than for memory: so `Transformer` below does all that `model.py`'s does, in one call.

The C++ wants the bf16 instructions of AVX-512 (Intel Cooper Lake, Sapphire Rapids and newer; AMD
Zen 4 and newer) and is built once, by the first process that needs it. Without them, without a
compiler or in other dtypes torch's own operations run.

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
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#define UNROLL _Pragma("GCC unroll 32")  // arrays of registers must have constant indices

using at::BFloat16;
using at::Tensor;

namespace {

constexpr int kTile = 32;        // rows of the weight in a tile: the lanes of two registers
constexpr int kPiece = 1 << 15;  // bytes of weights that are worth a thread
constexpr int kAhead = 1024;     // bytes from what is read to what is fetched, of bf16;
constexpr int kFurther = 6144;   // of codes, which take longer: each the fastest where measured

// What has one element for each half of a tile.
#define HALVES UNROLL for (int half = 0; half < 2; half++)
// What has one for each of M rows, or parts, in registers.
#define ROWS UNROLL for (int i = 0; i < M; i++)

// Have the second cache fetch what stands so many bytes behind p.
void fetch(const void* p, int ahead) {
  _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T1);
}

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
      if (p.rows <= FEW_ROWS) fetch(at, kAhead), fetch(at + kTile, kAhead);
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
    fetch(at, kFurther), fetch(at + 64, kFurther);
    const __m512i ws[] = {load(at, 0), load(at, 1)};
    HALVES sums[M][half] = _mm512_dpbusd_epi32(sums[M][half], _mm512_set1_epi8(1), ws[half]);
    ROWS {
      const auto four = _mm512_set1_epi32(x[i]);
      HALVES sums[i][half] = _mm512_dpbusd_epi32(sums[i][half], four, ws[half]);
    }
  }
  UNROLL for (int i = 0; i <= M; i++) HALVES to[i][half] = sums[i][half];
}

// The largest absolute value of n, by its bits: the exponent, then seven more.
int peak_bits(const BFloat16* x, int64_t n) {
  int most = 0;
  for (int64_t k = 0; k < n; k++) most = std::max<int>(most, x[k].x & 0x7fff);
  return most;
}

// Each row of x is rounded to whole numbers of which its peak is 127: its own, or that of float
// peaks [rows, 1].
Tensor linear_int8_activation(const Tensor& x, const Tensor& weight, const Tensor& scales,
                              const std::optional<Tensor>& peaks) {
  const int64_t out = scales.size(0);
  Product p(x, out, weight, 4, at::kBFloat16);
  std::vector<uint8_t> bytes(p.rows * p.in);
  std::vector<float> steps(p.rows);
  at::parallel_for(0, p.rows, kPiece / p.in + 1, [&](int64_t row, int64_t end) {
    for (; row < end; row++) {
      const auto from = p.x.const_data_ptr<BFloat16>() + row * p.in;
      const float peak = peaks ? peaks->const_data_ptr<float>()[row]
                               : float(BFloat16(peak_bits(from, p.in), BFloat16::from_bits()));
      steps[row] = std::max(peak, 1e-12f) / 127;
      for (int64_t k = 0; k < p.in; k += 16) {
        const auto mask = first(p.in - k);
        const auto values = floats(from + k, mask);
        auto code = _mm512_cvtps_epi32(_mm512_div_ps(values, _mm512_set1_ps(steps[row])));
        code = _mm512_add_epi32(code, _mm512_set1_epi32(128));  // unsigned
        _mm_mask_storeu_epi8(bytes.data() + row * p.in + k, mask, _mm512_cvtepi32_epi8(code));
      }
    }
  });
  const auto xs = interleave<12>(bytes.data(), p.rows, p.in / 4);
  auto w = weight.const_data_ptr<int8_t>();
  auto s = scales.const_data_ptr<BFloat16>();
  auto y = p.y.mutable_data_ptr<BFloat16>();
  for_tiles(weight.size(0), p.in * kTile, [&](int64_t tile) {
    blocks_of_rows<12>(p.rows, [&](int64_t m, auto M) {
      __m512i sums[M + 1][2];
      sum_up_int8<M>(xs.data() + m * p.in / 4, p.in, w + tile * kTile * p.in, sums);
      ROWS HALVES {
        const auto n = tile * kTile + 16 * half;
        const auto sum = _mm512_sub_epi32(sums[i][half], _mm512_slli_epi32(sums[M][half], 7));
        const auto y32 = _mm512_cvtepi32_ps(sum) * _mm512_set1_ps(steps[m + i]);
        store(y + (m + i) * out + n, first(out - n), y32 * floats(s + n, first(out - n)));
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
      const int most = peak_bits(x, p.in);
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

// ---- int4: tiles [in / 8, 32, 2] of 16-bit words, the even and the odd columns ------------------

const __m512i kValues = [] {
  std::array<BFloat16, 32> values;
  for (int i = 0; i < 32; i++) values[i] = i % 16 - 8;  // an index has five bits, a code four
  return _mm512_loadu_si512(values.data());
}();

// Pair number `pair` of columns of the four in words: the codes as bf16.
__m512bh values(__m512i words, int pair) {
  return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * pair), kValues);
}

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
    for (const int64_t end = (group + 1) * (in / groups); k < end; k += 8, w += 128, x += 4 * M) {
      fetch(w, kFurther), fetch(w + 64, kFurther);
      const __m512i words[] = {load(w, 0), load(w, 1)};
      UNROLL for (int pair = 0; pair < 4; pair++) {
        const __m512bh ws[] = {values(words[0], pair), values(words[1], pair)};
        ROWS {
          const auto both = (__m512bh)_mm512_set1_epi32(x[pair * M + i]);
          HALVES parts[i][half] = _mm512_dpbf16_ps(parts[i][half], ws[half], both);
        }
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
  Product p(x, out, weight, 8, at::kBFloat16);
  const int64_t groupsize = p.in / groups;
  auto w = weight.const_data_ptr<uint8_t>();
  auto g = grid.const_data_ptr<BFloat16>();
  if (p.rows > FEW_ROWS) {
    multiply_floats(p, tiles, [&](int64_t tile, int64_t k, int half) {
      const auto at = g + (tile * groups + k / groupsize) * 2 * kTile;
      const auto [scale, zero] = split(load(at, half));
      const auto words = load(w + (tile * p.in + k / 8 * 8) * kTile / 2, half);
      const auto [even, odd] = split((__m512i)values(words, k % 8 / 2));
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
  const int64_t rows = where.numel();
  const auto grain = 2048 / (longest * group) + 1;
  at::parallel_for(0, rows * kv_heads, grain, [&](int64_t task, int64_t end) {
    for (; task < end; task++) {
      const int64_t kv_head = task / rows, i = task % rows;
      const int64_t row = i % 2 ? rows - 1 - i / 2 : i / 2;  // early and late ones in turn
      const int64_t length = from[row] + 1, cache = (row / T * kv_heads + kv_head) * S * D;
      if (length == S) continue;
      blocks_of_rows<8>(D / 32, [&](int64_t, auto P) {
        blocks_of_rows<std::max(8 / P, 1)>(group, [&](int64_t head, auto M) {
          const auto at = ((row * kv_heads + kv_head) * group + head) * D;
          attend_to<M, P>(qs.const_data_ptr<BFloat16>() + at, k.const_data_ptr<BFloat16>() + cache,
                          v.const_data_ptr<BFloat16>() + cache, length,
                          y.mutable_data_ptr<BFloat16>() + at);
        });
      });
    }
  });
  return y;
}

// ---- The whole model, rounded to bf16 wherever model.py does ----------------------------------

__m512 rounded(__m512 x) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
}

// model.RMSNorm of n elements.
void normalize(const BFloat16* x, const BFloat16* weight, int64_t n, double eps, BFloat16* y) {
  auto squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k += 16) {
    const auto value = floats(x + k, first(n - k));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const auto scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / n + eps));
  for (int64_t k = 0; k < n; k += 16) {
    const auto mask = first(n - k);
    store(y + k, mask, rounded(floats(x + k, mask) * scale) * floats(weight + k, mask));
  }
}

Tensor norm(const Tensor& x, const Tensor& weight, double eps) {
  auto y = at::empty(x.sizes(), x.options());
  const int64_t n = x.size(1);
  at::parallel_for(0, x.size(0), kPiece / n + 1, [&](int64_t row, int64_t end) {
    for (; row < end; row++)
      normalize(x.const_data_ptr<BFloat16>() + row * n, weight.const_data_ptr<BFloat16>(), n, eps,
                y.mutable_data_ptr<BFloat16>() + row * n);
  });
  return y;
}

// y = f(x, y), in floats; x [rows, n] or [n].
template <typename F>
void update(const Tensor& y, const Tensor& x, F f) {
  const int64_t n = y.size(1), step = x.dim() == 2 ? n : 0;
  at::parallel_for(0, y.size(0), kPiece / n + 1, [&](int64_t row, int64_t end) {
    for (; row < end; row++) {
      auto to = y.mutable_data_ptr<BFloat16>() + row * n;
      auto from = x.const_data_ptr<BFloat16>() + row * step;
      for (int64_t k = 0; k < n; k += 16) {
        const auto mask = first(n - k);
        store(to + k, mask, f(floats(from + k, mask), floats(to + k, mask)));
      }
    }
  });
}

__m512 add(__m512 x, __m512 y) { return x + y; }

__m512 gate(__m512 x, __m512 y) { return rounded(x / (1.f + exp(-x))) * y; }  // silu(x) y

enum Scheme : int64_t { kFloats, kInt8, kInt8Activation, kInt4 };  // as numbered in linear.py

// A Linear: its weight as packed, what goes with it by scheme, and perhaps a bias.
struct Weight {
  int64_t scheme;
  Tensor tiles;
  std::optional<Tensor> grid, bias;

  int64_t in() const { return tiles.size(1) * (scheme == kFloats ? 2 : scheme == kInt4 ? 8 : 4); }

  Tensor times(const Tensor& x, int64_t out) const {
    auto y = product(x, out);
    if (bias) update(y, *bias, add);
    return y;
  }

  Tensor product(const Tensor& x, int64_t out) const {
    if (scheme == kFloats) return linear(x, tiles, out);
    if (scheme == kInt8) return linear_int8(x, tiles, *grid);
    if (scheme == kInt4) return linear_int4(x, tiles, *grid, out);
    return linear_int8_activation(x, tiles, *grid, std::nullopt);
  }
};

// Rotate the heads of q and k in qkv [rows, heads, D], after a norm if there is one, by freqs
// [S, D / 2, 2]; write k and v to the caches [B, KV heads, S, D]. Returns q [B, T, heads, D].
Tensor rotate(const Tensor& qkv, const Tensor& positions, const Tensor& freqs,
              const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& q_norm,
              const std::optional<Tensor>& k_norm, double eps) {
  const int64_t all = qkv.size(1), D = qkv.size(2), kv_heads = k_cache.size(1);
  const int64_t S = k_cache.size(2), T = positions.size(1), heads = all - 2 * kv_heads;
  auto q = at::empty({positions.size(0), T, heads, D}, qkv.options());
  at::parallel_for(0, positions.numel(), kPiece / (all * D) + 1, [&](int64_t row, int64_t end) {
    for (; row < end; row++) {
      const auto position = positions.const_data_ptr<int64_t>()[row];
      TORCH_CHECK(position >= 0 && position < S, "position ", position, " of a cache of ", S);
      if (position == S - 1) continue;  // padding
      const auto turns = freqs.const_data_ptr<float>() + position * D;
      for (int64_t head = 0; head < all; head++) {
        const auto from = qkv.mutable_data_ptr<BFloat16>() + (row * all + head) * D;
        const auto kv_head = (head - heads) % kv_heads;
        const auto place = ((row / T * kv_heads + kv_head) * S + position) * D;
        if (head >= heads + kv_heads) {
          std::copy_n(from, D, v_cache.mutable_data_ptr<BFloat16>() + place);
          continue;
        }
        const auto& weight = head < heads ? q_norm : k_norm;
        if (weight) normalize(from, weight->const_data_ptr<BFloat16>(), D, eps, from);
        const auto to = head < heads ? q.mutable_data_ptr<BFloat16>() + (row * heads + head) * D
                                     : k_cache.mutable_data_ptr<BFloat16>() + place;
        for (int64_t k = 0; k < D; k += 16) {
          const auto x = floats(from + k), turn = _mm512_loadu_ps(turns + k);
          const auto across = _mm512_permute_ps(x, 0xb1) * _mm512_movehdup_ps(turn);
          store(to + k, 0xffff, _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(turn), across));
        }
      }
    }
  });
  return q;
}

struct Layer {
  const Tensor attention_norm, ffn_norm;
  const std::optional<Tensor> q_norm, k_norm;
  const Tensor k_cache, v_cache;
  const Weight wqkv, wo, w1, w3, w2;
};

// model.Transformer. tensors: for each layer those of Layer, three for each Weight, then the last
// norm and the output; schemes: of each Weight.
class Transformer : public torch::CustomClassHolder {
 public:
  Transformer(Tensor embedding, Tensor freqs_cis, c10::List<std::optional<Tensor>> tensors,
              std::vector<int64_t> schemes, double eps)
      : embedding(embedding), freqs_cis(freqs_cis), eps(eps) {
    size_t at = 0, weights = 0;
    auto maybe = [&]() -> std::optional<Tensor> { return tensors.get(at++); };
    auto one = [&] { return *maybe(); };
    auto weight = [&] { return Weight{schemes[weights++], one(), maybe(), maybe()}; };
    while (weights + 1 < schemes.size())
      layers.push_back(Layer{one(), one(), maybe(), maybe(), one(), one(), weight(), weight(),
                             weight(), weight(), weight()});
    last_norm = one();
    output = weight();
  }

  // idx and input_pos [B, T], last [B, N]: the logits [B, T, vocabulary], or [B, N, ...].
  Tensor forward(const Tensor& idx, const Tensor& input_pos, const std::optional<Tensor>& last) {
    const int64_t B = idx.size(0), vocabulary = embedding.size(0), dim = embedding.size(1);
    TORCH_CHECK(idx.numel() && idx.sizes() == input_pos.sizes() &&
                    B <= layers[0].k_cache.size(0),
                "tokens, positions and cache differ in shape");
    const auto positions = input_pos.contiguous();
    auto x = embedding.index_select(0, idx.flatten());
    for (const auto& layer : layers) x = block(layer, x, positions);
    if (last) x = x.view({B, -1, dim}).take_along_dim(last->unsqueeze(-1), 1).view({-1, dim});
    return output.times(norm(x, last_norm, eps), vocabulary).view({B, -1, vocabulary});
  }

 private:
  // x [B T, dim].
  Tensor block(const Layer& layer, const Tensor& x, const Tensor& positions) {
    const auto& [attention_norm, ffn_norm, q_norm, k_norm, k_cache, v_cache, wqkv, wo, w1, w3, w2] =
        layer;
    const int64_t dim = x.size(1), D = k_cache.size(3), width = wo.in();
    const auto qkv = wqkv.times(norm(x, attention_norm, eps), width + 2 * k_cache.size(1) * D);
    const auto q = rotate(qkv.view({x.size(0), -1, D}), positions, freqs_cis, k_cache, v_cache,
                          q_norm, k_norm, eps);
    const auto h = wo.times(attend(q, k_cache, v_cache, positions).view({-1, width}), dim);
    update(h, x, add);
    const auto normed = norm(h, ffn_norm, eps);
    const auto up = w3.times(normed, w2.in());
    update(up, w1.times(normed, w2.in()), gate);
    const auto y = w2.times(up, dim);
    update(y, h, add);
    return y;
  }

  Tensor embedding, freqs_cis, last_norm;
  std::vector<Layer> layers;
  Weight output;
  double eps;
};

}  // namespace

TORCH_LIBRARY(tokenbus, library) {
  library.def("linear(Tensor x, Tensor weight, int out) -> Tensor");
  library.def("linear_int8(Tensor x, Tensor weight, Tensor scales) -> Tensor");
  library.def(
      "linear_int8_activation(Tensor x, Tensor weight, Tensor scales, Tensor? peaks) -> Tensor");
  library.def("linear_int4(Tensor x, Tensor weight, Tensor grid, int out) -> Tensor");
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor positions) -> Tensor");
  library.class_<Transformer>("Transformer")
      .def(torch::init<Tensor, Tensor, c10::List<std::optional<Tensor>>, std::vector<int64_t>,
                       double>())
      .def("forward", &Transformer::forward);
}

TORCH_LIBRARY_IMPL(tokenbus, CPU, library) {
  library.impl("linear", linear);
  library.impl("linear_int8", linear_int8);
  library.impl("linear_int8_activation", linear_int8_activation);
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
        "linear_int8_activation": lambda x, weight, scales, peaks: x.new_empty(len(x), len(scales)),
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
    even, odd = weight >> 4, weight & 15  # columns
    codes = torch.stack((even[:, ::2] | even[:, 1::2] << 4, odd[:, ::2] | odd[:, 1::2] << 4), -1)
    codes = codes.view(len(weight), -1, 2, 2).transpose(2, 3).flatten(1)
    grid = F.pad(scales_and_zeros, (0, 0, 0, -len(weight) % 32)).unflatten(1, (-1, 32))
    return pack(codes, 4), grid.transpose(0, 1).contiguous()
