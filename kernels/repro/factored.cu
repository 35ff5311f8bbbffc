// Butterflies without building bfly: checks factored.cu against the dense product in f64 at sizes 2 to 4,096, and times it.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -Ikernels kernels/repro/factored.cu -o factored && ./factored > factored.jsonl
//   ./factored 1024 > times.jsonl; with GENERIC=1 of the kernel for all shapes, with CHECK=1024 no times and checks up to that size
//
// JSON lines with every sample: errors over the largest entry of the reference; microseconds of a launch and of a copy of
// the same rows, in turns over inputs that do not fit into the cache together. Exits with 1 where an error is above 1e-5.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>
#include "../factored.cu"

#define CHECK(call)                                                                             \
  do {                                                                                          \
    const cudaError_t e = (call);                                                               \
    if (e != cudaSuccess) fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)), exit(1); \
  } while (0)

template <typename A> A *room(size_t count) {
  A *p;
  CHECK(cudaMalloc(&p, count * sizeof(A)));
  CHECK(cudaMemset(p, 0, count * sizeof(A)));
  return p;
}
template <typename A> A *sent(const std::vector<A> &v) {
  A *p = room<A>(std::max<size_t>(v.size(), 1));
  CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(A), cudaMemcpyHostToDevice));
  return p;
}
template <typename A> std::vector<A> back(const A *p, size_t count) {
  std::vector<A> v(count);
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaMemcpy(v.data(), p, count * sizeof(A), cudaMemcpyDeviceToHost));
  return v;
}

struct Shape {
  int n, planes, tied, stack, rows;
  int levels() const { return 31 - __builtin_clz(n); }
  int parameters() const { return 4 * planes * (tied ? n - 1 : n / 2 * levels()); }
  int tiles() const { return THREADS / std::min(std::max(n >> K, 1), THREADS); }
  int row() const { return (n - 1 + ((n - 1) >> 6) * 8 + 4) & ~3; }
};

using Kernel = void (*)(Butterfly);
Kernel kernel(const Shape &s, bool backward) {
  if (s.planes == 1)
    return s.tied ? (backward ? factored_backward_real_tied : factored_forward_real_tied)
                  : (backward ? factored_backward_real_untied : factored_forward_real_untied);
  return s.tied ? (backward ? factored_backward_complex_tied : factored_forward_complex_tied)
                : (backward ? factored_backward_complex_untied : factored_forward_complex_untied);
}

// The kernel that streams rows, its bytes of shared memory, rows of a tile and streams of a block; none where there is none.
struct Streamed {
  Kernel kernel = nullptr;
  size_t bytes = 0;
  int rows = 0, streams = 0;
};
template <int C, bool TIED> Streamed streamed_of(int n, Kernel k256, Kernel k512, Kernel k1024) {
  if (n == 256) return {k256, Stream<C, TIED, 8>::SHARED, Stream<C, TIED, 8>::V, Stream<C, TIED, 8>::STREAMS};
  if (n == 512) return {k512, Stream<C, TIED, 9>::SHARED, Stream<C, TIED, 9>::V, Stream<C, TIED, 9>::STREAMS};
  if (n == 1024) return {k1024, Stream<C, TIED, 10>::SHARED, Stream<C, TIED, 10>::V, Stream<C, TIED, 10>::STREAMS};
  return {};
}
Streamed streamed(const Shape &s, const Butterfly &b) {
  if (b.index || (s.planes == 2 && !s.tied)) return {};
  if (s.planes == 2) return streamed_of<2, true>(s.n, factored_stream_complex_tied_256, factored_stream_complex_tied_512, factored_stream_complex_tied_1024);
  if (s.tied) return streamed_of<1, true>(s.n, factored_stream_real_tied_256, factored_stream_real_tied_512, factored_stream_real_tied_1024);
  return streamed_of<1, false>(s.n, factored_stream_real_untied_256, factored_stream_real_untied_512, factored_stream_real_untied_1024);
}

struct Run {
  Shape s;
  Butterfly b;
  int blocks, v;
  size_t shared;
  bool generic = false;
  Run(const Shape &s, Butterfly b, bool backward) : s(s), b(b) {
    const int passes = (s.levels() + K - 1) / K;
    v = s.planes == 1 ? REAL_ROWS : COMPLEX_ROWS;
    // Two blocks a multiprocessor.
    while (backward && v > 1 && (size_t)s.tiles() * v * s.planes * s.row() * 4 * (passes + 1) > 113 << 10) v /= 2;
    this->b.each = v;
    const int all = (s.rows + s.tiles() * v - 1) / (s.tiles() * v);
    shared = (size_t)s.tiles() * v * s.planes * s.row() * 4 * (backward ? passes + 1 : 1);
    blocks = backward ? std::min(all, 264) : all;
    CHECK(cudaFuncSetAttribute(kernel(s, backward), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
  }
  void go(bool backward) const {
    const Streamed stream = backward || generic ? Streamed{} : streamed(s, b);
    if (stream.kernel) {
      const int tiles = (s.rows + stream.rows - 1) / stream.rows;
      CHECK(cudaFuncSetAttribute(stream.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)stream.bytes));
      stream.kernel<<<dim3(std::min((tiles + stream.streams - 1) / stream.streams, 132), s.stack), STREAMED, stream.bytes>>>(b);
      CHECK(cudaGetLastError());
      return;
    }
    kernel(s, backward)<<<dim3(blocks, s.stack), THREADS, shared>>>(b);
    CHECK(cudaGetLastError());
  }
};

// The product of the factors on one row in f64, and back.
void reference(const Shape &s, const float *w, std::vector<double> &re, std::vector<double> &im, std::vector<std::vector<double>> *kept) {
  for (int level = 0; level < s.levels(); level++) {
    if (kept) kept->push_back(re), kept->push_back(im);
    const int half = 1 << level;
    for (int a = 0; a < s.n; a++)
      if (!(a & half)) {
        const int j = a & (half - 1), c = s.planes;
        const float *d = w + 4 * c * (s.tied ? half - 1 + j : s.n / 2 * level + (a >> (level + 1)) * half + j);
        const double r[2] = {re[a], re[a + half]}, i[2] = {im[a], im[a + half]};
        for (int o = 0; o < 2; o++) {
          double x = 0, y = 0;
          for (int k = 0; k < 2; k++) {
            const double p = d[(2 * o + k) * c], q = c == 2 ? d[(2 * o + k) * c + 1] : 0;
            x += p * r[k] - q * i[k], y += p * i[k] + q * r[k];
          }
          re[a + o * half] = x, im[a + o * half] = y;
        }
      }
  }
}
void reference_back(const Shape &s, const float *w, std::vector<double> &re, std::vector<double> &im,
                    const std::vector<std::vector<double>> &kept, double *g) {
  for (int level = s.levels() - 1; level >= 0; level--) {
    const auto &x = kept[2 * level], &y = kept[2 * level + 1];
    const int half = 1 << level;
    for (int a = 0; a < s.n; a++)
      if (!(a & half)) {
        const int j = a & (half - 1), c = s.planes, at = 4 * c * (s.tied ? half - 1 + j : s.n / 2 * level + (a >> (level + 1)) * half + j);
        const double r[2] = {re[a], re[a + half]}, i[2] = {im[a], im[a + half]};
        for (int k = 0; k < 2; k++) {
          double p = 0, q = 0;
          for (int o = 0; o < 2; o++) {
            const int e = at + (2 * o + k) * c;
            const double u = w[e], v = c == 2 ? w[e + 1] : 0;
            p += u * r[o] + v * i[o], q += u * i[o] - v * r[o];
            g[e] += r[o] * x[a + k * half] + i[o] * y[a + k * half];
            if (c == 2) g[e + 1] += i[o] * x[a + k * half] - r[o] * y[a + k * half];
          }
          re[a + k * half] = p, im[a + k * half] = q;
        }
      }
  }
}

bool check(const Shape &s, std::mt19937 &rng) {
  std::normal_distribution<float> normal;
  auto random = [&](size_t count, float scale) {
    std::vector<float> v(count);
    for (auto &x : v) x = scale * normal(rng);
    return v;
  };
  const int n = s.n, c = s.planes;
  const auto x = random((size_t)s.rows * c * n, 1), dy = random((size_t)s.rows * s.stack * c * n, 1);
  const auto w = random((size_t)s.stack * s.parameters(), c == 1 ? 0.7f : 0.5f);
  std::vector<uint32_t> index(n);
  for (int i = 0; i < n; i++) index[i] = i;
  std::shuffle(index.begin(), index.end(), rng);
  const bool sorted = rng() & 1;
  Butterfly b = {};
  b.x = sent(x), b.w = sent(w), b.dy = sent(dy), b.index = sorted ? sent(index) : nullptr;
  b.rows = s.rows, b.n = n, b.levels = s.levels(), b.parameters = s.parameters(), b.stack = s.stack;
  float *y = room<float>(dy.size()), *dx = room<float>(x.size() * s.stack), *dw = room<float>(w.size());
  b.y = y;
  Run(s, b, false).go(false);
  b.y = dx;
  Run r(s, b, true);
  const size_t untied = (size_t)2 * n * s.levels() * c, copies = (size_t)r.blocks * s.tiles();
  r.b.partial = room<float>(copies * s.stack * untied);
  r.go(true);
  factored_sum<<<dim3((s.parameters() + 255) / 256, s.stack), 256>>>(r.b.partial, dw, copies, s.stack, n, s.levels(), c, s.tied);
  const auto got_y = back(y, dy.size()), got_dx = back(dx, x.size() * s.stack), got_dw = back(dw, w.size());
  double off[3] = {}, most[3] = {};
  auto compare = [&](int which, double got, double want) {
    off[which] = std::max(off[which], std::isnan(got) ? 1e30 : std::abs(got - want)), most[which] = std::max(most[which], std::abs(want));
  };
  for (int k = 0; k < s.stack; k++) {
    std::vector<double> g(s.parameters());
    for (int row = 0; row < s.rows; row++) {
      std::vector<double> re(n), im(n), dr(n), di(n);
      std::vector<std::vector<double>> kept;
      for (int e = 0; e < n; e++) {
        const int from = sorted ? index[e] : e;
        re[e] = x[((size_t)row * c) * n + from], im[e] = c == 2 ? x[((size_t)row * c + 1) * n + from] : 0;
        dr[e] = dy[(((size_t)row * s.stack + k) * c) * n + e], di[e] = c == 2 ? dy[(((size_t)row * s.stack + k) * c + 1) * n + e] : 0;
      }
      reference(s, &w[(size_t)k * s.parameters()], re, im, &kept);
      for (int e = 0; e < n; e++) {
        compare(0, got_y[(((size_t)row * s.stack + k) * c) * n + e], re[e]);
        if (c == 2) compare(0, got_y[(((size_t)row * s.stack + k) * c + 1) * n + e], im[e]);
      }
      reference_back(s, &w[(size_t)k * s.parameters()], dr, di, kept, g.data());
      for (int e = 0; e < n; e++) {
        const int to = sorted ? index[e] : e;
        compare(1, got_dx[(((size_t)k * s.rows + row) * c) * n + to], dr[e]);
        if (c == 2) compare(1, got_dx[(((size_t)k * s.rows + row) * c + 1) * n + to], di[e]);
      }
    }
    for (int i = 0; i < s.parameters(); i++) compare(2, got_dw[(size_t)k * s.parameters() + i], g[i]);
  }
  double error = 0;
  for (int i = 0; i < 3; i++) error = std::max(error, off[i] / most[i]);
  printf("{\"n\": %d, \"planes\": %d, \"tied\": %d, \"stack\": %d, \"rows\": %d, \"index\": %d, \"error_y\": %.2e, \"error_dx\": %.2e, \"error_dw\": %.2e}\n",
         n, c, s.tied, s.stack, s.rows, sorted, off[0] / most[0], off[1] / most[1], off[2] / most[2]);
  for (void *p : {(void *)b.x, (void *)b.w, (void *)b.dy, (void *)b.index, (void *)y, (void *)dx, (void *)dw, (void *)r.b.partial}) cudaFree(p);
  return error < 1e-5;
}

void time(const Shape &s, std::mt19937 &rng) {
  const size_t count = (size_t)s.rows * s.planes * s.n;
  const int buffers = std::max<size_t>(2, ((size_t)1 << 28) / (count * 4)), launches = 20;
  std::normal_distribution<float> normal;
  std::vector<float> x(count), w(s.parameters());
  for (auto &v : x) v = normal(rng);
  for (auto &v : w) v = (s.planes == 1 ? 0.7f : 0.5f) * normal(rng);
  std::vector<float *> from(buffers), to(buffers);
  for (int i = 0; i < buffers; i++) from[i] = sent(x), to[i] = room<float>(count);
  Butterfly b = {};
  b.w = sent(w), b.rows = s.rows, b.n = s.n, b.levels = s.levels(), b.parameters = s.parameters(), b.stack = 1, b.dy = from[0];
  Run forward(s, b, false), backward(s, b, true);
  forward.generic = getenv("GENERIC") != nullptr;
  backward.b.partial = room<float>((size_t)backward.blocks * s.tiles() * 2 * s.n * s.levels() * s.planes);
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::string samples[3];
  std::vector<float> all[3];
  for (int round = 0; round < 21; round++)
    for (int what = 0; what < 3; what++) {
      CHECK(cudaEventRecord(begin));
      for (int i = 0; i < launches; i++) {
        const int at = (round * launches + i) % buffers;
        Run &r = what == 1 ? forward : backward;
        r.b.x = from[at], r.b.y = to[at];
        if (what == 0) CHECK(cudaMemcpyAsync(to[at], from[at], count * 4, cudaMemcpyDeviceToDevice));
        else r.go(what == 2);
      }
      CHECK(cudaEventRecord(end));
      CHECK(cudaEventSynchronize(end));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (round == 0) continue;
      all[what].push_back(ms / launches * 1e3f);
      samples[what] += (samples[what].empty() ? "" : ", ") + std::to_string(ms / launches * 1e3f);
    }
  for (auto &a : all) std::sort(a.begin(), a.end());
  printf("{\"time\": true, \"n\": %d, \"planes\": %d, \"tied\": %d, \"rows\": %d, \"copy_us\": [%s], \"forward_us\": [%s], \"backward_us\": [%s]}\n",
         s.n, s.planes, s.tied, s.rows, samples[0].c_str(), samples[1].c_str(), samples[2].c_str());
  fprintf(stderr, "n %d planes %d tied %d: copy %.2f us, forward %.2f us (%.0f%% of copy), backward %.2f us\n", s.n, s.planes, s.tied, all[0][10],
          all[1][10], 100 * all[0][10] / all[1][10], all[2][10]);
  for (auto *p : from) cudaFree(p);
  for (auto *p : to) cudaFree(p);
  cudaFree(backward.b.partial);
}

int main(int count, char **arguments) {
  std::mt19937 rng(1);
  bool fine = true;
  // With a size, no checks and the times of that size alone.
  const int only = count > 1 ? atoi(arguments[1]) : 0;
  // With CHECK, sizes up to it are checked and none is timed, as under compute-sanitizer.
  const char *check_to = getenv("CHECK");
  const int most = check_to ? atoi(check_to) : 4096;
  if (!only)
  for (int n : {2, 4, 8, 16, 32, 128, 256, 512, 1024, 2048, 4096})
   if (n <= most)
    for (int planes : {1, 2})
      for (int tied : {0, 1})
        for (int again = 0; again < 2; again++)
          fine &= check({n, planes, tied, 1 + (int)(rng() % 3), 1 + (int)(rng() % (n > 1024 ? 21 : 70))}, rng);
  if (!only) fprintf(stderr, "%s\n", fine ? "every error is below 1e-5" : "ERRORS");
  if (!check_to)
  for (int n : only ? std::vector<int>{only} : std::vector<int>{256, 1024, 4096})
    for (int planes : {1, 2})
      for (int tied : {0, 1}) time({n, planes, tied, 1, (4096 * 1024) / n}, rng);
  return !fine;
}
