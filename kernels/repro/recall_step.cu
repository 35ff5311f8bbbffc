// Times a decode step of exact recall without building bfly: the four kernels of recall_*.cu in a captured graph of all layers,
// each layer with codes and a region of pinned memory of its own, as src/ops/recall/cuda.rs launches them.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a -Ikernels kernels/repro/recall_step.cu -o recall_step
//   ./recall_step 0.5b 262144 2048 codes [SAVE]       shape (0.5b, 1.5b or 4b), context, k, rest (codes or none)
//
// FETCHERS in the environment: thread blocks that fetch rows, instead of 16.
//
// Prints microseconds a layer: the whole step, and the step cut after each kernel (medians of 50 replays). SAVE gets the chosen
// positions and the output of the last step of every layer, to compare two versions of the kernels.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>
#pragma nv_diag_suppress 1886  // one file's alignment of dynamic shared memory is not another's
#include "../recall_choose.cu"
#include "../recall_fetch.cu"
#undef INSTANCE
#include "../recall_scan.cu"

#define CHECK(call)                                                                             \
  do {                                                                                          \
    const cudaError_t e = (call);                                                               \
    if (e != cudaSuccess) fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)), exit(1); \
  } while (0)

struct Shape {
  const char *name;
  int layers, heads, kv_heads, dim, bytes;
};
constexpr Shape SHAPES[] = {{"0.5b", 24, 14, 2, 64, 12}, {"1.5b", 28, 12, 2, 128, 24}, {"4b", 36, 32, 8, 128, 24}};

template <typename T> T *room(size_t count) {
  T *p;
  CHECK(cudaMalloc(&p, std::max<size_t>(count, 1) * sizeof(T)));
  CHECK(cudaMemset(p, 0, std::max<size_t>(count, 1) * sizeof(T)));
  return p;
}
template <typename T> T *upload(const std::vector<T> &from) {
  T *p = room<T>(from.size());
  CHECK(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

struct Step {
  const void *kernel;
  dim3 grid;
  int threads;
  size_t shared;
};

void launch(const Step &step, RecallParams p, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = step.grid, config.blockDim = step.threads, config.dynamicSmemBytes = step.shared, config.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early, config.numAttrs = 1;
  void *arguments[] = {&p};
  CHECK(cudaFuncSetAttribute(step.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)step.shared));
  CHECK(cudaLaunchKernelExC(&config, step.kernel, arguments));
}

int main(int count, char **words) {
  if (count < 5) return fprintf(stderr, "usage: recall_step SHAPE CTX K codes|none [SAVE]\n"), 2;
  const Shape *shape = std::find_if(std::begin(SHAPES), std::end(SHAPES), [&](const Shape &s) { return !strcmp(s.name, words[1]); });
  if (shape == std::end(SHAPES)) return fprintf(stderr, "%s: not a shape\n", words[1]), 2;
  const int layers = shape->layers, heads = shape->heads, kv = shape->kv_heads, dim = shape->dim, bytes = shape->bytes;
  const int ctx = atoi(words[2]), k = atoi(words[3]), group = heads / kv, subs = dim / RECALL_SUB;
  const bool codes = !strcmp(words[4], "codes");
  int processors;
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  auto normals = [&](size_t n, float by) {
    std::vector<float> x(n);
    for (auto &v : x) v = by * normal(random);
    return x;
  };

  // Half of the channels in two bits, half in one.
  std::vector<RecallField> fields;
  std::vector<int> first;
  for (int g = 0; g < kv; g++) {
    int bit = 0, byte = 0;
    for (int pass = 2; pass >= 1; pass--)
      for (int c = pass == 2 ? 0 : dim / 2; c < (pass == 2 ? dim / 2 : dim); c++) {
        if (bit % 8 == 0) first.push_back((int)fields.size() - g * dim), byte++;
        fields.push_back({(uint16_t)c, (uint8_t)(bit % 8), (uint8_t)pass});
        bit += pass;
      }
    first.push_back(dim);
    if (byte != bytes) return fprintf(stderr, "%d bytes\n", byte), 1;
  }
  std::vector<float> levels(256);
  for (int b = 1; b <= 4; b++)
    for (int i = 0; i < 1 << b; i++) {
      levels[(1 << b) + i] = 0.9f * (i - ((1 << b) - 1) / 2.f);
      if (i + 1 < 1 << b) levels[128 + (1 << b) + i] = 0.9f * (i + 1 - (1 << b) / 2.f);
    }

  RecallParams p = {};
  p.fields = upload(fields), p.first = upload(first), p.levels = upload(levels);
  p.mean = p.read_mean = upload(normals(kv * dim, 0.1f));
  p.scale = p.read_scale = upload(std::vector<float>(kv * dim, 1.f));
  std::vector<__half> book(kv * subs * 256 * RECALL_SUB);
  for (auto &x : book) x = __float2half(normal(random));
  p.codebook = p.read_codebook = upload(book);
  p.near_out = upload(normals(heads * dim, 1.f));
  p.near_lse = upload(normals(heads, 1.f));
  p.ctx = p.rows = ctx, p.position = ctx - 2, p.own_rows = 128, p.heads = heads, p.kv_heads = kv, p.dim = dim, p.bytes = bytes, p.k = k;
  p.sinks = 4, p.window_kind = 1, p.window_size = 64, p.store_type = p.means_type = 1, p.factor = 1.f / sqrtf((float)dim);
  p.block = 128;
  // As Cut::over.
  const int per = group <= 4 ? 4 : 8, subsets = codes ? (dim + 63) / 64 : 1;
  const char *fetching = getenv("FETCHERS");
  p.fetchers = std::max((fetching ? atoi(fetching) : 16) / kv, 1);
  p.slice_count = std::max((processors - kv) / (kv * ((group + per - 1) / per)), 1);
  p.rest_slices = codes ? std::clamp((processors - kv * p.fetchers) / (kv * subsets), 1, 128) : 0;
  p.scores = room<__half>((size_t)heads * ctx), p.slices = room<float2>(heads * p.slice_count), p.weights = room<float>((size_t)kv * ctx);
  p.histogram = room<int>(kv * 2 * RECALL_BINS), p.listed = room<uint2>(kv * RECALL_LISTED), p.counts = room<int>(kv);
  p.bitmap = room<uint32_t>((size_t)kv * ctx / 32), p.lowest = room<float>(kv), p.mass = room<float>(heads);
  p.parts = room<float>((size_t)kv * (p.fetchers + p.rest_slices + 1) * RECALL_HEADS * (dim + 4));
  p.counters = room<int>(kv * RECALL_COUNTERS), p.redone = room<uint32_t>(1), p.fetched = room<unsigned long long>(2);

  std::vector<RecallParams> all(layers, p);
  const size_t row = 2 * dim * 2, region = (size_t)kv * ctx * row;
  std::vector<uint32_t> noise(1 << 22);
  for (auto &x : noise) x = random();
  for (auto &l : all) {
    l.q = upload(normals(heads * dim, 1.f)), l.out = room<float>(heads * dim), l.chosen = room<int>(kv * k), l.previous = room<int>(kv * (k + 1));
    l.key_codes = room<uint8_t>((size_t)kv * ctx * bytes + 64), l.value_codes = codes ? room<uint8_t>((size_t)kv * ctx * subs + 64) : nullptr;
    auto fill = [&](uint8_t *to, size_t size) {
      for (size_t at = 0; at < size; at += noise.size() * 4)
        CHECK(cudaMemcpy(to + at, noise.data(), std::min(noise.size() * 4, size - at), cudaMemcpyHostToDevice));
    };
    std::rotate(noise.begin(), noise.begin() + 12345, noise.end());
    fill(l.key_codes, (size_t)kv * ctx * bytes);
    if (codes) fill(l.value_codes, (size_t)kv * ctx * subs);
    std::vector<__nv_bfloat16> own(128 * kv * dim);
    for (auto &x : own) x = __float2bfloat16(normal(random));
    l.own_k = upload(own), l.own_v = upload(own);
    CHECK(cudaHostAlloc(&l.store, region, cudaHostAllocMapped));
    std::vector<__nv_bfloat16> rows(1 << 20);
    for (auto &x : rows) x = __float2bfloat16(normal(random));
    std::vector<std::thread> workers;
    for (int t = 0; t < 16; t++)
      workers.emplace_back([&, t] {
        const size_t piece = rows.size() * 2, pieces = (region + piece - 1) / piece;
        for (size_t i = t; i < pieces; i += 16) memcpy((char *)l.store + i * piece, rows.data(), std::min(piece, region - i * piece));
      });
    for (auto &w : workers) w.join();
  }

  const bool eight = per == 8;
  const void *scan = bytes == 12 ? (eight ? (const void *)recall_scan_8_12 : (const void *)recall_scan_4_12)
                                 : (eight ? (const void *)recall_scan_8_24 : (const void *)recall_scan_4_24);
  const void *fetch = dim == 64 ? (eight ? (const void *)recall_fetch_bf16_64_8 : (const void *)recall_fetch_bf16_64_4)
                                : (eight ? (const void *)recall_fetch_bf16_128_8 : (const void *)recall_fetch_bf16_128_4);
  const int lanes = dim == 64 ? 16 : 32;
  auto per_head = [&](int blocks, int tokens) { return std::max(std::min(blocks / kv, (ctx + tokens - 1) / tokens), 1); };
  const size_t choose_shared = 8 * RECALL_LISTED + (ctx <= 512 << 10 ? ctx / 8 : 0);
  const Step steps[] = {
      {scan, dim3(p.slice_count + 1, kv, (group + per - 1) / per), 1024, 20 << 10},
      {(const void *)recall_weigh, dim3(per_head(2 * processors, 4096), kv), 512, 0},
      {(const void *)recall_choose, dim3(per_head(processors, 8192), kv), 1024, choose_shared},
      {fetch, dim3(kv * (p.fetchers + p.rest_slices * subsets)), 512,
       (size_t)std::max(codes ? (128 << 10) + 64 * 512 : 16 << 10, 4 * (512 / lanes) * (group * (dim + 3) + 8))},
  };

  cudaStream_t stream;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  printf("%s ctx %d k %d %s:", shape->name, ctx, k, words[4]);
  // A step cut after weigh or choose leaves its counts: those are cleared by a memset of the same size in every cut.
  for (int until = 1; until <= 4; until++) {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (const auto &l : all)
      for (int i = 0; i < until; i++) launch(steps[i], l, stream);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 60; i++) {
      CHECK(cudaMemsetAsync(p.histogram, 0, kv * 2 * RECALL_BINS * 4, stream));
      CHECK(cudaEventRecord(begin, stream));
      CHECK(cudaGraphLaunch(ready, stream));
      CHECK(cudaEventRecord(end, stream));
      CHECK(cudaStreamSynchronize(stream));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 10) times.push_back(ms * 1000 / layers);
    }
    std::sort(times.begin(), times.end());
    printf(" %s %.1f", (const char *[]){"scan", "+weigh", "+choose", "+fetch"}[until - 1], times[times.size() / 2]);
    fflush(stdout);
  }
  uint32_t redone;
  unsigned long long fetched[2];
  CHECK(cudaMemcpy(&redone, p.redone, 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(fetched, p.fetched, 16, cudaMemcpyDeviceToHost));
  printf(" us a layer; redone %u, fetched %llu, again %llu\n", redone, fetched[0], fetched[1]);
  if (count > 5) {
    FILE *file = fopen(words[5], "wb");
    if (!file) return fprintf(stderr, "%s: cannot be written\n", words[5]), 1;
    for (const auto &l : all) {
      std::vector<int> chosen(kv * k);
      std::vector<float> out(heads * dim);
      CHECK(cudaMemcpy(chosen.data(), l.chosen, chosen.size() * 4, cudaMemcpyDeviceToHost));
      CHECK(cudaMemcpy(out.data(), l.out, out.size() * 4, cudaMemcpyDeviceToHost));
      fwrite(chosen.data(), 4, chosen.size(), file), fwrite(out.data(), 4, out.size(), file);
    }
    fclose(file);
  }
}
