// G-STE on a CPU: the codes of N2UQ and their backward, one pass each, for `qexp/quant/gste_native.py`,
// where the arguments are explained. Plain C interface; vectors of 16 floats, which the compiler
// lowers to what the machine has.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t CHUNK = 1 << 14;  // elements whose sums are float32; chunks are added in double
constexpr int COPIES = 8;           // of the bins, so that neighbours do not wait for each other

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef float Pair __attribute__((vector_size(8)));

Floats all(float value) { return Floats{} + value; }

Floats look_up(const Floats& table, const Ints& index) {
#ifdef __clang__
  Floats found;
  for (int j = 0; j < LANES; ++j) found[j] = table[index[j]];
  return found;
#else
  return __builtin_shuffle(table, index);
#endif
}

template <class V, class T>
V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

Floats load(const float* p) { return read<Floats>(p); }
void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

Floats load(const uint16_t* p) {  // bfloat16: the upper half of a float32
  const Ints bits = __builtin_convertvector(read<Shorts>(p), Ints) << 16;
  return read<Floats>(&bits);
}

void store(uint16_t* p, Floats v) {  // rounds half to even
  const Ints bits = read<Ints>(&v);
  const Ints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Ints number = v == v;
  const Shorts s = __builtin_convertvector((rounded & number) | (~number & 0x7FC0), Shorts);
  std::memcpy(p, &s, sizeof s);
}

// #{k: z > table[k]}, K = 2^b - 1 borders and +inf; a NaN is above all of them.
template <int K>
Ints count(const Floats& z, const Floats& table) {
  Ints n{};
#pragma GCC unroll 8
  for (int bit = (K + 1) / 2; bit > 0; bit /= 2) n += ~(z <= look_up(table, n + (bit - 1))) & bit;
  return n;
}

template <class T, int M>
void forward(const T* x, T* y, int64_t n, const float* thresholds, float step, float qmin) {
  Floats table = all(__builtin_inff());
  for (int k = 0; k < M; ++k) table[k] = thresholds[k];
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

// Sums of pairs (g, g f) by segment. Few segments: a masked addition for each of them; more: an
// addition at a computed place for each element, whose cost does not grow with their number.
template <int M, bool MASKED = (M <= 7)>
struct Bins;

template <int M>
struct Bins<M, true> {
  Floats total[M] = {}, weighted[M] = {};

  void add(const Ints& segment, const Floats& g, const Floats& gf) {
    const Floats zero{};
#pragma GCC unroll 8
    for (int k = 0; k < M; ++k) {
      const Ints here = segment == (Ints{} + k);
      total[k] += here ? g : zero;
      weighted[k] += here ? gf : zero;
    }
  }
  void finish(double* sums) const {
    for (int k = 0; k < M; ++k)
      for (int j = 0; j < LANES; ++j) {
        sums[k] += total[k][j];
        sums[M + k] += weighted[k][j];
      }
  }
};

template <int M>
struct Bins<M, false> {
  Pair pairs[COPIES][M + 1] = {};  // a NaN is in segment M, and adds nothing

  void add(const Ints& segment, const Floats& g, const Floats& gf) {
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) pairs[j % COPIES][segment[j]] += Pair{g[j], gf[j]};
  }
  void finish(double* sums) const {
    for (int k = 0; k < M; ++k)
      for (int c = 0; c < COPIES; ++c) {
        sums[k] += pairs[c][k][0];
        sums[M + k] += pairs[c][k][1];
      }
  }
};

// sums [2 M + 1]: of g by segment, of g f by segment, of e * code
template <class T, int M>
void backward(const T* grad, const T* x, T* grad_x, int64_t n, const float* borders, float step,
              float qmin, double* sums) {
  Floats left{}, scale{}, middle{}, inner = all(__builtin_inff());
  for (int k = 0; k < M; ++k) {
    left[k] = borders[k];
    scale[k] = 1 / (borders[k + 1] - borders[k]);
    middle[k] = (borders[k + 1] + borders[k]) / 2;
    if (k > 0) inner[k - 1] = borders[k];
  }
  const Floats low = all(borders[0]), high = all(borders[M]), zero{};
  for (int64_t start = 0; start < n; start += CHUNK) {
    Bins<M> bins;
    Floats codes{};
    const auto run = [&](const T* zp, const T* ep, T* gp) {
      const Floats z = load(zp), e = load(ep);
      const Ints segment = count<M>(z, inner);
      const Ints inside = (z > low) & (z <= high);
      const Floats inv = look_up(scale, segment);
      const Floats f = (z - look_up(left, segment)) * inv;
      const Floats g = inside ? e * step * inv : zero;
      store(gp, g);
      Ints code = segment - ~(z <= look_up(middle, segment));
      code = code > M ? Ints{} + M : code;  // of a NaN
      codes += e * (__builtin_convertvector(code, Floats) + qmin);
      bins.add(segment, g, inside ? g * f : zero);
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
    bins.finish(sums);
    for (int j = 0; j < LANES; ++j) sums[2 * M] += codes[j];
  }
}

// work(part, first, last) for `threads` parts of n elements at most, each whole chunks.
template <class F>
void in_parallel(int64_t n, int threads, F work) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, chunks));
  const auto edge = [&](int64_t t) { return std::min(n, chunks * t / parts * CHUNK); };
  std::vector<std::thread> others;
  others.reserve(parts);
  for (int64_t t = 1; t < parts; ++t) {
    const auto run = [=] { work(t, edge(t), edge(t + 1)); };
    try {
      others.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads
      run();
    }
  }
  work(0, 0, edge(1));
  for (auto& other : others) other.join();
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
