// Gated DeltaNet without building bfly: checks delta_chunks.cu and delta_step.cu against delta.cu's recurrence in f32, and
// times them. delta_fla.py times flash-linear-attention's kernels at the same shapes.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -Ikernels kernels/repro/delta.cu -o delta && ./delta > delta.jsonl
//
// JSON lines with every sample: errors as root mean squares over the reference's; milliseconds of a layer over all positions
// and of each kernel; microseconds of a step in a captured graph of 24 layers with overlapped launches, and of a step of
// 64 states. Exits with 1 where an error is above 1% (bf16 factors) or 1e-5 (steps).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>
#include "../common.cuh"
#include "../decode.cuh"
namespace recurrence {
#include "../delta.cu"
}
namespace chunks {
#include "../delta_chunks.cu"
}
namespace steps {
#include "../delta_step.cu"
}

#define CHECK(call)                                                                             \
  do {                                                                                          \
    const cudaError_t e = (call);                                                               \
    if (e != cudaSuccess) fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(e)), exit(1); \
  } while (0)

using T = __nv_bfloat16;
constexpr int DIM = 128, TAPS = 4, SAMPLES = 10;

template <typename A> A *room(size_t count) {
  A *p;
  CHECK(cudaMalloc(&p, count * sizeof(A)));
  CHECK(cudaMemset(p, 0, count * sizeof(A)));
  return p;
}

__device__ inline float uniform(uint64_t i, uint64_t seed) {
  uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1b54a32d192ed03ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull, z ^= z >> 31;
  return (z >> 40) * (1.f / (1 << 24));
}
// Numbers from `low` to `high`; `narrow` gets them rounded, and `wide` what they are rounded to.
__global__ void fill(T *narrow, float *wide, size_t count, int seed, float low, float high) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
    const float x = low + (high - low) * uniform(i, seed);
    if (narrow) narrow[i] = __float2bfloat16(x);
    if (wide) wide[i] = narrow ? __bfloat162float(narrow[i]) : x;
  }
}

struct Layer {
  int keys, values, channels, segment;
  T *x, *z, *beta, *decay, *out;
  float *wide_x, *wide_z, *wide_beta, *wide_decay, *wide_out, *conv, *rate, *bias, *norm, *ring, *state, *wide_ring, *wide_state, *u;
  chunks::ChunkParams p{};
  std::vector<void *> all;

  template <typename A> A *keep(size_t count) {
    A *at = room<A>(count);
    all.push_back(at);
    return at;
  }
  Layer(int keys, int group, size_t tokens, int segment, bool checked)
      : keys(keys), values(keys * group), channels((2 * keys + keys * group) * DIM), segment(segment) {
    const size_t width = (size_t)values * DIM, rows = (size_t)(segment + 63) / 64 * 64;
    auto input = [&](T *&narrow, float *&wide, size_t count, int seed) {
      narrow = keep<T>(count), wide = checked ? keep<float>(count) : nullptr;
      fill<<<1024, 256>>>(narrow, wide, count, seed, -2.f, 2.f);
    };
    input(x, wide_x, tokens * channels, 1), input(z, wide_z, tokens * width, 2);
    input(beta, wide_beta, tokens * values, 3), input(decay, wide_decay, tokens * values, 4);
    auto weight = [&](float *&w, size_t count, int seed, float low, float high) {
      fill<<<64, 256>>>(nullptr, w = keep<float>(count), count, seed, low, high);
    };
    weight(conv, (size_t)channels * TAPS, 5, -.7f, .7f), weight(rate, values, 6, -8.f, -.001f);
    weight(bias, values, 7, -4.f, 1.f), weight(norm, DIM, 8, .5f, 1.5f);
    ring = keep<float>((size_t)TAPS * channels), state = keep<float>(width * DIM), out = keep<T>(tokens * width);
    if (checked) {
      wide_ring = keep<float>((size_t)TAPS * channels), wide_state = keep<float>(width * DIM);
      u = keep<float>(tokens * channels), wide_out = keep<float>(tokens * width);
    }
    p.conv = conv, p.rate = rate, p.bias = bias, p.norm = norm, p.ring = ring, p.state = state, p.eps = 1e-6f;
    p.q = keep<T>(rows * keys * DIM), p.k = keep<T>(rows * keys * DIM), p.v = keep<T>(rows * width), p.u = keep<T>(rows * width);
    p.m = keep<T>(rows * values * 64), p.a = keep<T>(rows * values * 64), p.before = keep<T>(rows / 64 * width * DIM);
    p.sums = keep<float>(rows * values), p.key_heads = keys, p.value_heads = values;
  }
  ~Layer() {
    for (void *at : all) cudaFree(at);
  }

  // Positions from .. from + count; `which` of prepare (1), states (2), outputs (4), keep (8).
  void run(size_t from, size_t count, int tiled, int which = 15) {
    const size_t width = (size_t)values * DIM;
    p.x = x + from * channels, p.z = z + from * width, p.beta = beta + from * values, p.decay = decay + from * values;
    p.out = out + from * width, p.position = from, p.tiled = tiled;
    for (size_t start = 0; start < count; start += segment) {
      p.start = start, p.length = std::min<size_t>(segment, count - start);
      const int pieces = (p.length + 63) / 64, blocks = values * (DIM / chunks::COLUMNS);
      if (which & 1) chunks::delta_prepare_bf16<<<dim3(pieces, keys), 256, sizeof(chunks::Prepare<T>)>>>(p);
      if (which & 2 && blocks <= 132) chunks::delta_states_bf16_4<<<blocks, 128, sizeof(chunks::States<T, 4>)>>>(p);
      if (which & 2 && blocks > 132) chunks::delta_states_bf16_2<<<blocks, 128, sizeof(chunks::States<T, 2>)>>>(p);
      if (which & 4) chunks::delta_outputs_bf16<<<dim3(pieces, values), 256, sizeof(chunks::Outputs<T>)>>>(p);
    }
    p.start = 0, p.length = count;
    if (which & 8) chunks::delta_keep_bf16<<<(channels + 255) / 256, 256>>>(p);
    CHECK(cudaGetLastError());
  }
  void reference(size_t from, size_t count, int tiled) {
    const size_t width = (size_t)values * DIM;
    recurrence::DeltaParams r{};
    r.x = wide_x + from * channels, r.z = wide_z + from * width, r.beta = wide_beta + from * values;
    r.decay = wide_decay + from * values, r.conv = conv, r.rate = rate, r.bias = bias, r.norm = norm, r.u = u, r.ring = wide_ring;
    r.state = wide_state, r.out = wide_out + from * width, r.tokens = count, r.position = from, r.key_heads = keys;
    r.value_heads = values, r.key_dim = r.value_dim = DIM, r.kernel = TAPS, r.tiled = tiled, r.eps = 1e-6f;
    const int columns = (channels + 255) / 256;
    recurrence::delta_convolve<<<dim3(columns, (count + 63) / 64), 256>>>(r);
    recurrence::delta_keep<<<columns, 256>>>(r);
    recurrence::delta_unit<<<(2 * keys * count + 7) / 8, 256>>>(r);
    recurrence::delta_scan<<<values, 1024>>>(r);
    CHECK(cudaGetLastError());
  }
};

template <typename A> std::vector<float> host(const A *from, size_t count) {
  std::vector<A> raw(count);
  CHECK(cudaMemcpy(raw.data(), from, count * sizeof(A), cudaMemcpyDeviceToHost));
  return std::vector<float>(raw.begin(), raw.end());
}
bool failed = false;
double off(const std::vector<float> &got, const std::vector<float> &want, double limit) {
  double apart = 0, size = 0;
  for (size_t i = 0; i < got.size(); i++) apart += pow(got[i] - want[i], 2), size += pow(want[i], 2);
  const double error = sqrt(apart / size);
  if (!(error < limit)) failed = true;
  return error;
}

steps::StepParams step_of(const Layer &l, const DecodeState *at, int tiled) {
  return {nullptr, nullptr, nullptr, nullptr, l.conv, l.rate, l.bias, l.norm, l.ring, l.state, nullptr, at, l.keys, l.values, DIM, DIM, TAPS, tiled, 1e-6f, 0};
}

void check(int keys, int group, int tokens, int tiled) {
  Layer l(keys, group, tokens, 256, true);
  const size_t width = (size_t)l.values * DIM, cuts[] = {(size_t)tokens / 3, 1, (size_t)tokens / 5, (size_t)tokens};
  size_t from = 0;
  for (size_t cut : cuts) {
    const size_t count = std::min(cut, tokens - from);
    if (count) l.run(from, count, tiled), l.reference(from, count, tiled), from += count;
  }
  const std::vector<float> want = host(l.wide_out, tokens * width), state = host(l.wide_state, width * DIM);
  const double out = off(host(l.out, tokens * width), want, 1e-2), kept = off(host(l.state, width * DIM), state, 1e-2);
  CHECK(cudaMemset(l.ring, 0, (size_t)TAPS * l.channels * 4));
  CHECK(cudaMemset(l.state, 0, width * DIM * 4));
  std::vector<DecodeState> at(tokens);
  for (int i = 0; i < tokens; i++) at[i] = DecodeState{i, 0, 0, 0, 0};
  DecodeState *positions = l.keep<DecodeState>(tokens);
  CHECK(cudaMemcpy(positions, at.data(), tokens * sizeof(DecodeState), cudaMemcpyHostToDevice));
  float *made = l.keep<float>(tokens * width);
  for (int i = 0; i < tokens; i++) {
    steps::StepParams p = step_of(l, positions + i, tiled);
    p.x = l.wide_x + (size_t)i * l.channels, p.z = l.wide_z + i * width, p.beta = l.wide_beta + i * l.values;
    p.decay = l.wide_decay + i * l.values, p.out = made + i * width;
    steps::delta_step<<<dim3(l.values, 1), 512>>>(p);
  }
  const double stepped = off(host(made, tokens * width), want, 1e-5);
  printf("{\"kind\": \"error\", \"key_heads\": %d, \"value_heads\": %d, \"tokens\": %d, \"output\": %.3e, \"state\": %.3e, \"steps\": %.3e}\n", keys,
         l.values, tokens, out, kept, stepped);
}

template <typename F> std::string timed(cudaStream_t stream, double scale, F f) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::string samples;
  for (int i = -3; i < SAMPLES; i++) {
    CHECK(cudaEventRecord(begin, stream));
    f();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) samples += (i ? ", " : "") + std::to_string(ms * scale);
  }
  return "[" + samples + "]";
}

void time_chunks(int keys, int group, size_t tokens, int segment) {
  Layer l(keys, group, tokens, segment, false);
  printf("{\"kind\": \"chunk\", \"key_heads\": %d, \"value_heads\": %d, \"tokens\": %zu, \"segment\": %d", keys, l.values, tokens, segment);
  const struct { const char *name; int which; } parts[] = {{"ms", 15}, {"prepare_ms", 1}, {"states_ms", 2}, {"outputs_ms", 4}};
  for (auto part : parts) printf(", \"%s\": %s", part.name, timed(0, 1, [&] { l.run(0, tokens, 0, part.which); }).c_str());
  printf("}\n");
}

void time_steps(int keys, int group, int states) {
  Layer l(keys, group, states, 64, true);
  const size_t width = (size_t)l.values * DIM;
  const int layers = states == 1 ? 24 : 2;
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  DecodeState *at = l.keep<DecodeState>(1);
  float *rings = l.keep<float>((size_t)states * TAPS * l.channels), *out = l.keep<float>(states * width);
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  for (int i = 0; i < layers; i++) {
    steps::StepParams p = step_of(l, at, 0);
    p.x = l.wide_x, p.z = l.wide_z, p.beta = l.wide_beta, p.decay = l.wide_decay, p.ring = rings, p.out = out;
    p.state = l.keep<float>(states * width * DIM);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(l.values, states), config.blockDim = 512, config.stream = stream;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early, config.numAttrs = i > 0 && states == 1;
    CHECK(cudaLaunchKernelEx(&config, steps::delta_step, p));
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  const std::string us = timed(stream, 1e3 / layers, [&] { CHECK(cudaGraphLaunch(exec, stream)); });
  printf("{\"kind\": \"step\", \"key_heads\": %d, \"value_heads\": %d, \"states\": %d, \"state_bytes\": %zu, \"us\": %s}\n", keys, l.values, states,
         2 * states * width * DIM * 4, us.c_str());
}

template <typename K> void allow(K kernel, size_t bytes) { CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)); }

int main() {
  allow(chunks::delta_prepare_bf16, sizeof(chunks::Prepare<T>));
  allow(chunks::delta_states_bf16_4, sizeof(chunks::States<T, 4>));
  allow(chunks::delta_states_bf16_2, sizeof(chunks::States<T, 2>));
  allow(chunks::delta_outputs_bf16, sizeof(chunks::Outputs<T>));
  const int cases[][4] = {{1, 1, 64, 0}, {1, 1, 1, 0}, {2, 1, 130, 0}, {2, 3, 300, 1}, {4, 2, 777, 0}, {16, 1, 1500, 0}, {16, 3, 1000, 0}};
  for (auto &c : cases) check(c[0], c[1], c[2], c[3]);
  for (int group : {1, 2, 3}) {
    for (size_t tokens : {2048, 8192, 65536})
      for (int segment : {1024, 2048, 4096})
        if ((size_t)segment <= tokens) time_chunks(16, group, tokens, segment);
    for (int states : {1, 64}) time_steps(16, group, states);
  }
  float *from = room<float>(1 << 28), *to = room<float>(1 << 28);
  const std::string ms = timed(0, 1, [&] { cudaMemcpyAsync(to, from, 4ull << 28, cudaMemcpyDeviceToDevice); });
  printf("{\"kind\": \"copy\", \"bytes\": %llu, \"ms\": %s}\n", 8ull << 28, ms.c_str());
  return failed;
}
