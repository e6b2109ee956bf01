// The AVX-512 instructions of kernels.cpp in portable C++, so that its arithmetic is tested on any
// x86 CPU: `-I tests/emulated` puts this file before the compiler's own. Semantics are those of the
// Intel Intrinsics Guide; no instruction set beyond AVX2 and FMA is needed.
#pragma once
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

using Floats = __m512;
using Ints = int __attribute__((vector_size(64)));
using Words = unsigned short __attribute__((vector_size(64)));
using Bits = unsigned __attribute__((vector_size(64)));
using Doubles = __m512d;

#define LANES(n) for (int i = 0; i < n; i++)

inline float bf16_to_float(uint16_t word) {
  const uint32_t bits = uint32_t(word) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even; denormals become 0.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return (bits >> 16) | 0x40;
  if (!(bits & 0x7f800000)) return (bits >> 16) & 0x8000;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline Floats fma(Floats a, Floats b, Floats c) {
  Floats r;
  LANES(16) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}

template <typename T>
T load(const void* p) {
  T r;
  memcpy(&r, p, sizeof r);
  return r;
}

template <typename T>
void store(void* p, T value) {
  memcpy(p, &value, sizeof value);
}

inline Floats set1(float x) { return Floats{} + x; }

inline Floats dpbf16(Floats sum, __m512bh a, __m512bh b) {
  const Bits high = Bits{} + 0xffff0000;
  sum = fma((Floats)((Bits)a & high), (Floats)((Bits)b & high), sum);  // odd elements first
  return fma((Floats)((Bits)a << 16), (Floats)((Bits)b << 16), sum);
}

// Of 4 bytes a lane: unsigned ones of a times signed ones of b.
inline __m512i dpbusd(__m512i sum, __m512i a, __m512i b) {
  auto r = (Ints)sum;
  for (int byte = 0; byte < 4; byte++)
    r += (Ints)((Bits)a << (24 - 8 * byte) >> 24) * ((Ints)((Bits)b << (24 - 8 * byte)) >> 24);
  return (__m512i)r;
}

inline __m512i round_to_ints(Floats a) {  // to the nearest, ties to even
  Ints r;
  LANES(16) r[i] = int(std::nearbyintf(a[i]));
  return (__m512i)r;
}

inline Floats max(Floats a, Floats b) {  // the second of equals and of NaN, as the instruction
  Floats r;
  LANES(16) r[i] = a[i] > b[i] ? a[i] : b[i];
  return r;
}

// Pairwise: lanes 8 apart, then 4, 2 and 1, as the compiler's own sequence.
template <typename F>
float reduce(Floats a, F f) {
  for (int width = 8; width; width /= 2) LANES(width) a[i] = f(a[i], a[i + width]);
  return a[0];
}

inline Floats masked(uint32_t mask, Floats a) {
  LANES(16) a[i] = mask >> i & 1 ? a[i] : 0;
  return a;
}

// Lanes picked within each 128 bits: index(i) of the 4 lanes of a, or 4 more for those of b.
template <typename F>
Floats shuffle(Floats a, Floats b, F index) {
  Floats r;
  LANES(16) {
    const int from = index(i % 4);
    r[i] = from < 4 ? a[i / 4 * 4 + from] : b[i / 4 * 4 + from - 4];
  }
  return r;
}

inline Floats shuffle_f32x4(Floats a, Floats b, int control) {
  Floats r;
  LANES(16) r[i] = (i < 8 ? a : b)[(control >> (i / 4 * 2) & 3) * 4 + i % 4];
  return r;
}

inline __m512bh to_bf16(Floats high, Floats low) {
  Words r;
  LANES(32) r[i] = float_to_bf16(i < 16 ? low[i] : high[i - 16]);
  return (__m512bh)r;
}

inline __m512i permute_words(__m512i index, __m512i a) {
  Words r;
  LANES(32) r[i] = ((Words)a)[((Words)index)[i] & 31];
  return (__m512i)r;
}

template <typename V, int n, typename T>
V load_masked(uint32_t mask, const T* p) {
  T r[n] = {};
  LANES(n) if (mask >> i & 1) r[i] = p[i];
  return load<V>(r);
}

template <typename T, typename V>
void store_masked(T* p, uint32_t mask, V value, int n) {
  T r[sizeof(V) / sizeof(T)];
  memcpy(r, &value, sizeof value);
  LANES(n) if (mask >> i & 1) p[i] = r[i];
}

inline Floats scale_by_power(Floats a, Floats b) {
  LANES(16) a[i] = std::isfinite(b[i]) ? std::ldexp(a[i], int(std::floor(b[i])))
                                       : a[i] * (b[i] > 0 ? INFINITY : 0.f);
  return a;
}

inline __m128i low_bytes(__m512i a) {
  uint8_t r[16];
  LANES(16) r[i] = ((Bits)a)[i];
  return load<__m128i>(r);
}

inline __m512i widen(__m256i a) {
  uint16_t words[16];
  memcpy(words, &a, 32);
  Bits r;
  LANES(16) r[i] = words[i];
  return (__m512i)r;
}

inline __m256bh narrow(Floats a) {
  uint16_t r[16];
  LANES(16) r[i] = float_to_bf16(a[i]);
  return load<__m256bh>(r);
}

inline Floats alternate(Floats a, Floats b, Floats c) {  // even lanes a b - c, odd ones a b + c
  LANES(16) c[i] = i % 2 ? c[i] : -c[i];
  return fma(a, b, c);
}

inline Floats to_floats(__m512i a) { return __builtin_convertvector((Ints)a, Floats); }
inline __m512i truncated(Floats a) { return (__m512i)__builtin_convertvector(a, Ints); }

inline Floats rounded(Floats a) {
  LANES(16) a[i] = std::nearbyintf(a[i]);
  return a;
}

inline Doubles unpack(Doubles a, Doubles b, int from) {
  Doubles r;
  LANES(8) r[i] = (i % 2 ? b : a)[i / 2 * 2 + from];
  return r;
}

#undef LANES

}  // namespace emulated

#define _mm512_set1_ps(x) emulated::set1(x)
#define _mm512_setzero_ps() (emulated::Floats{})
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_set1_epi32(x) ((__m512i)(emulated::Ints{} + int(x)))
#define _mm512_set1_epi8(x) ((__m512i)(emulated::Bits{} + 0x01010101u * uint8_t(x)))
#define _mm512_loadu_si512(p) emulated::load<__m512i>(p)
#define _mm512_load_si512(p) emulated::load<__m512i>(p)
#define _mm512_loadu_ps(p) emulated::load<__m512>(p)
#define _mm512_storeu_si512(p, x) emulated::store<__m512i>(p, x)
#define _mm512_storeu_ps(p, x) emulated::store<__m512>(p, x)
#define _mm512_maskz_loadu_ps(mask, p) (emulated::load_masked<__m512, 16, float>(mask, p))
#define _mm512_maskz_loadu_epi16(mask, p) \
  (emulated::load_masked<__m512i, 32, uint16_t>(mask, (const uint16_t*)(p)))
#define _mm256_maskz_loadu_epi16(mask, p) \
  (emulated::load_masked<__m256i, 16, uint16_t>(mask, (const uint16_t*)(p)))
#define _mm256_mask_storeu_epi16(p, mask, x) \
  emulated::store_masked<uint16_t>((uint16_t*)(p), mask, x, 16)
#define _mm_mask_storeu_epi8(p, mask, x) emulated::store_masked<uint8_t>((uint8_t*)(p), mask, x, 16)
#define _mm512_mask_storeu_ps(p, mask, x) emulated::store_masked<float>(p, mask, x, 16)
#define _mm512_fmadd_ps(a, b, c) emulated::fma(a, b, c)
#define _mm512_fnmadd_ps(a, b, c) emulated::fma(-(a), b, c)
#define _mm512_fmaddsub_ps(a, b, c) emulated::alternate(a, b, c)
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_max_ps(a, b) emulated::max(a, b)
#define _mm512_add_epi32(a, b) ((__m512i)((emulated::Ints)(a) + (emulated::Ints)(b)))
#define _mm512_sub_epi32(a, b) ((__m512i)((emulated::Ints)(a) - (emulated::Ints)(b)))
#define _mm512_and_si512(a, b) ((__m512i)((emulated::Bits)(a) & (emulated::Bits)(b)))
#define _mm512_slli_epi32(a, n) ((__m512i)((emulated::Bits)(a) << (n)))
#define _mm512_srli_epi32(a, n) ((__m512i)((emulated::Bits)(a) >> (n)))
#define _mm512_srai_epi32(a, n) ((__m512i)((emulated::Ints)(a) >> (n)))
#define _mm512_srli_epi16(a, n) ((__m512i)((emulated::Words)(a) >> (n)))
#define _mm512_dpbf16_ps(sum, a, b) emulated::dpbf16(sum, a, b)
#define _mm512_dpbusd_epi32(sum, a, b) emulated::dpbusd(sum, a, b)
#define _mm512_cvtepi32_ps(a) emulated::to_floats(a)
#define _mm512_cvtps_epi32(a) emulated::round_to_ints(a)
#define _mm512_cvttps_epi32(a) emulated::truncated(a)
#define _mm512_cvtepu16_epi32(a) emulated::widen(a)
#define _mm512_cvtepi32_epi8(a) emulated::low_bytes(a)
#define _mm512_cvtneps_pbh(a) emulated::narrow(a)
#define _mm512_cvtne2ps_pbh(high, low) emulated::to_bf16(high, low)
#define _mm512_cvtss_f32(a) ((a)[0])
#define _mm512_permutexvar_epi16(index, a) emulated::permute_words(index, a)
#define _mm512_permute_ps(a, control) \
  emulated::shuffle(a, a, [](int i) { return (control) >> (2 * i) & 3; })
#define _mm512_movehdup_ps(a) emulated::shuffle(a, a, [](int i) { return i | 1; })
#define _mm512_moveldup_ps(a) emulated::shuffle(a, a, [](int i) { return i & ~1; })
#define _mm512_unpacklo_ps(a, b) emulated::shuffle(a, b, [](int i) { return i / 2 + i % 2 * 4; })
#define _mm512_unpackhi_ps(a, b) emulated::shuffle(a, b, [](int i) { return i / 2 + i % 2 * 4 + 2; })
#define _mm512_unpacklo_pd(a, b) emulated::unpack(a, b, 0)
#define _mm512_unpackhi_pd(a, b) emulated::unpack(a, b, 1)
#define _mm512_shuffle_f32x4(a, b, control) emulated::shuffle_f32x4(a, b, control)
#define _mm512_maskz_mov_ps(mask, a) emulated::masked(mask, a)
#define _mm512_roundscale_ps(a, zero) emulated::rounded(a)
#define _mm512_scalef_ps(a, b) emulated::scale_by_power(a, b)
#define _mm512_reduce_add_ps(a) emulated::reduce(a, [](float x, float y) { return x + y; })
#define _mm512_reduce_max_ps(a) emulated::reduce(a, [](float x, float y) { return x > y ? x : y; })
