// G-STE on a CPU: the codes of N2UQ and their backward, one pass each, for `qexp/quant/gste_native.py`,
// where the arguments are explained. Plain C interface. A vector is what the machine holds in one
// register; what C++ cannot say of its lanes stands under `Lanes`.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
constexpr bool FUSED = true;  // g f is added as it is multiplied
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
constexpr bool FUSED = false;
#else
constexpr int LANES = 4, REGISTERS = 16;
constexpr bool FUSED = false;
#endif
constexpr int64_t CHUNK = 1 << 14;  // elements whose sums are float32; chunks are added in double

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

struct alignas(64) Table {  // what is looked up by segment; +inf behind the last
  float of[16];
  Table() { std::fill(of, of + 16, __builtin_inff()); }
};

inline Floats all(float value) { return Floats{} + value; }

template <class V, class T>
void read(V& v, const T* p) { std::memcpy(&v, p, sizeof v); }

inline Floats load(const float* p) {
  Floats v;
  read(v, p);
  return v;
}

inline Floats load(const uint16_t* p) {  // bfloat16: the upper half of a float32
  Shorts s;
  read(s, p);
  return (Floats)(__builtin_convertvector(s, Ints) << 16);
}

inline void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
inline void store(int32_t* p, const Ints& v) { std::memcpy(p, &v, sizeof v); }

inline void store(uint16_t* p, const Floats& v) {  // rounds half to even
  const Ints bits = (Ints)v, number = v == v;
  const Ints rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
  const Shorts s = __builtin_convertvector((rounded & number) | (~number & 0x7FC0), Shorts);
  std::memcpy(p, &s, sizeof s);
}

// ------------------------------------------------------------------------------------------------
// Lanes

// table.of[index], index in 0..M.
template <int M>
Floats look_up(const Table& table, const Ints& index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table.of));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table.of), (__m256i)index);
  if (M < 8) return (Floats)low;
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table.of + 8), (__m256i)index);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // by the bit of 8
#else
  Floats found;
  for (int j = 0; j < LANES; ++j) found[j] = table.of[index[j]];
  return found;
#endif
}

// total += g and weighted += g f where index is k; second: f if FUSED, else g f.
inline void add_where(Floats& total, Floats& weighted, const Ints& index, int k, const Floats& g,
                      const Floats& second) {
#if defined(__AVX512F__)
  const __mmask16 here = _mm512_cmpeq_epi32_mask((__m512i)index, _mm512_set1_epi32(k));
  total = (Floats)_mm512_mask_add_ps((__m512)total, here, (__m512)total, (__m512)g);
  weighted = (Floats)_mm512_mask3_fmadd_ps((__m512)g, (__m512)second, (__m512)weighted, here);
#else
  const Ints here = index == k;
  total += (Floats)((Ints)g & here);
  weighted += (Floats)((Ints)second & here);
#endif
}

// Elements for `Bins`, not yet added. Those outside all segments, half of them behind a ReLU, have
// nothing to add: they are left out, or marked with segment -1.
struct Buffer {
  static constexpr int ROOM = 64 * LANES;
  alignas(64) int32_t segment[ROOM + 2 * LANES];
  alignas(64) float g[ROOM + 2 * LANES], second[ROOM + 2 * LANES];
  int filled = 0;

  void push(const Ints& inside, const Ints& s, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_test_epi32_mask((__m512i)inside, (__m512i)inside);
    store(segment + filled, (Ints)_mm512_maskz_compress_epi32(kept, (__m512i)s));
    store(g + filled, (Floats)_mm512_maskz_compress_ps(kept, (__m512)a));
    store(second + filled, (Floats)_mm512_maskz_compress_ps(kept, (__m512)b));
    filled += __builtin_popcount(kept);
#else
    store(segment + filled, (s & inside) | ~inside);
    store(g + filled, a);
    store(second + filled, b);
    filled += LANES;
#endif
  }
};

// ------------------------------------------------------------------------------------------------
// Forward and backward

// #{k: z > table[k]}, K = 2^b - 1 borders and +inf; a NaN is above all of them.
template <int K>
Ints count(const Floats& z, const Table& table) {
  Ints n = ~(z <= all(table.of[K / 2])) & (K + 1) / 2;
#pragma GCC unroll 8
  for (int bit = (K + 1) / 4; bit > 0; bit /= 2)
    n += ~(z <= look_up<K>(table, n + (bit - 1))) & bit;
  return n;
}

template <class T, int M>
void forward(const T* x, T* y, int64_t n, const float* thresholds, float step, float qmin) {
  Table table;
  std::copy(thresholds, thresholds + M, table.of);
  const auto run = [&](const T* from, T* to) {
    store(to, (__builtin_convertvector(count<M>(load(from), table), Floats) + qmin) * step);
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) run(x + i, y + i);
  if (i < n) {
    T in[LANES] = {}, out[LANES];
    std::memcpy(in, x + i, (n - i) * sizeof(T));
    run(in, out);
    std::memcpy(y + i, out, (n - i) * sizeof(T));
  }
}

// Sums of g and g f by segment: a masked addition for each segment. They are made from a short
// buffer, so many segments at a time as there are registers for their sums.
template <int M>
struct Bins {
  static constexpr int GROUP = std::min(M, REGISTERS / 4);
  Floats total[M] = {}, weighted[M] = {};
  Buffer buffer;

  void add(const Ints& inside, const Ints& segment, const Floats& g, const Floats& f) {
    const Floats second = FUSED ? f : g * f;
    if constexpr (M <= 3) {
      const Ints kept = (segment & inside) | ~inside;
#pragma GCC unroll 8
      for (int k = 0; k < M; ++k) add_where(total[k], weighted[k], kept, k, g, second);
    } else {
      buffer.push(inside, segment, g, second);
      if (buffer.filled >= Buffer::ROOM) flush();
    }
  }

  template <int FIRST>
  void add_group() {
    constexpr int SIZE = std::min(GROUP, M - FIRST);
    Floats t[SIZE], w[SIZE];
    std::copy(total + FIRST, total + FIRST + SIZE, t);
    std::copy(weighted + FIRST, weighted + FIRST + SIZE, w);
    for (int i = 0; i < buffer.filled; i += LANES) {
      Ints segment;
      read(segment, buffer.segment + i);
      const Floats g = load(buffer.g + i), second = load(buffer.second + i);
#pragma GCC unroll 8
      for (int k = 0; k < SIZE; ++k) add_where(t[k], w[k], segment, FIRST + k, g, second);
    }
    std::copy(t, t + SIZE, total + FIRST);
    std::copy(w, w + SIZE, weighted + FIRST);
    if constexpr (FIRST + SIZE < M) add_group<FIRST + SIZE>();
  }

  void flush() {
    store(buffer.segment + buffer.filled, Ints{} - 1);  // the rest of the last vector
    add_group<0>();
    buffer.filled = 0;
  }

  void finish(Doubles* sums) {
    flush();
    for (int k = 0; k < M; ++k) {
      sums[k] += __builtin_convertvector(total[k], Doubles);
      sums[M + k] += __builtin_convertvector(weighted[k], Doubles);
    }
  }
};

// sums [2 M + 1]: of g by segment, of g f by segment, of e * code
template <class T, int M>
void backward(const T* grad, const T* x, T* grad_x, int64_t n, const float* borders, float step,
              float qmin, double* sums) {
  Table left, scale, middle, inner, level;
  for (int k = 0; k < M; ++k) {
    left.of[k] = borders[k];
    scale.of[k] = 1 / (borders[k + 1] - borders[k]);
    middle.of[k] = (borders[k + 1] + borders[k]) / 2;
    if (k > 0) inner.of[k - 1] = borders[k];
  }
  for (int k = 0; k <= M; ++k) level.of[k] = k + qmin;
  Doubles lanes[2 * M + 1] = {};
  const Floats low = all(borders[0]), high = all(borders[M]);
  for (int64_t start = 0; start < n; start += CHUNK) {
    Bins<M> bins;
    Floats codes{};
    const auto run = [&](const T* zp, const T* ep, T* gp) {
      const Floats z = load(zp), e = load(ep);
      const Ints segment = count<M>(z, inner);
      const Ints inside = (z > low) & (z <= high);
      const Floats inv = look_up<M>(scale, segment);
      const Floats f = (z - look_up<M>(left, segment)) * inv;
      const Floats g = (Floats)((Ints)(e * step * inv) & inside);
      store(gp, g);
      const Ints code = segment - (z > look_up<M>(middle, segment));  // a NaN's segment is M
      codes += e * look_up<M>(level, code);
      bins.add(inside, segment, g, f);
    };
    const int64_t end = std::min(n, start + CHUNK);
    int64_t i = start;
    for (; i + LANES <= end; i += LANES) run(x + i, grad + i, grad_x + i);
    if (i < end) {  // the rest; where e = 0 nothing is added
      T z[LANES] = {}, e[LANES] = {}, g[LANES];
      std::memcpy(z, x + i, (end - i) * sizeof(T));
      std::memcpy(e, grad + i, (end - i) * sizeof(T));
      run(z, e, g);
      std::memcpy(grad_x + i, g, (end - i) * sizeof(T));
    }
    bins.finish(lanes);
    lanes[2 * M] += __builtin_convertvector(codes, Doubles);
  }
  for (int k = 0; k <= 2 * M; ++k)
    for (int j = 0; j < LANES; ++j) sums[k] += lanes[k][j];
}

// work(part, first, last) for `threads` parts of n elements at most, each whole chunks. Under OpenMP
// the team is torch's own: beside threads that wait for its next loop, new ones would find no core.
template <class F>
void in_parallel(int64_t n, int threads, F work) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, chunks));
  const auto run = [&](int64_t t) {
    work(t, chunks * t / parts * CHUNK, std::min(n, chunks * (t + 1) / parts * CHUNK));
  };
  if (parts == 1) return run(0);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < parts; ++t) run(t);
#else
  std::vector<std::thread> others;
  others.reserve(parts);
  for (int64_t t = 1; t < parts; ++t) {
    try {
      others.emplace_back(run, t);
    } catch (const std::system_error&) {  // no more threads
      run(t);
    }
  }
  run(0);
  for (auto& other : others) other.join();
#endif
}

template <class T, int M>
void all_forward(const T* x, T* y, int64_t n, const float* thresholds, float step, float qmin,
                 int threads) {
  in_parallel(n, threads, [=](int64_t, int64_t first, int64_t last) {
    forward<T, M>(x + first, y + first, last - first, thresholds, step, qmin);
  });
}

template <class T, int M>
void all_backward(const T* grad, const T* x, T* grad_x, int64_t n, const float* borders, float step,
                  float qmin, double* sums, int threads) {
  constexpr int WIDTH = 2 * M + 1;
  std::vector<double> parts(WIDTH * std::max(1, threads));
  double* of_parts = parts.data();
  in_parallel(n, threads, [=](int64_t part, int64_t first, int64_t last) {
    backward<T, M>(grad + first, x + first, grad_x + first, last - first, borders, step, qmin,
                   of_parts + WIDTH * part);
  });
  std::fill(sums, sums + WIDTH, 0.0);
  for (size_t i = 0; i < parts.size(); ++i) sums[i % WIDTH] += parts[i];
}

}  // namespace

#define EXPORT(NAME, T, M)                                                                       \
  extern "C" void gste_forward_##NAME##_##M(const T* x, T* y, int64_t n, const float* thresholds, \
                                            float step, float qmin, int threads) {               \
    all_forward<T, M>(x, y, n, thresholds, step, qmin, threads);                                 \
  }                                                                                              \
  extern "C" void gste_backward_##NAME##_##M(const T* grad, const T* x, T* grad_x, int64_t n,    \
                                             const float* borders, float step, float qmin,       \
                                             double* sums, int threads) {                        \
    all_backward<T, M>(grad, x, grad_x, n, borders, step, qmin, sums, threads);                  \
  }

EXPORT(float32, float, 3)
EXPORT(float32, float, 7)
EXPORT(float32, float, 15)
EXPORT(bfloat16, uint16_t, 3)
EXPORT(bfloat16, uint16_t, 7)
EXPORT(bfloat16, uint16_t, 15)
