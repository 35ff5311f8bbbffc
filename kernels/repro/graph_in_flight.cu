// graph_in_flight: does destroying an executable graph while its last launch runs hang the GPU?
//
//   nvcc -O2 -arch=sm_90 -o graph_in_flight graph_in_flight.cu -lcuda
//   graph_in_flight THREADS ROUNDS PROGRAMMATIC WAIT KERNELS
//
// Each thread captures KERNELS launches on a stream of its own, launches the graph a few times, and destroys it: after a wait for the
// stream (WAIT 1) or at once (0). With PROGRAMMATIC 1 each launch may overlap the one before it (programmatic dependent launch).
//
// One H200, driver 580.159.04, CUDA 13.0, `timeout 8 graph_in_flight ... 60` (60 kernels, 50 rounds):
//
//   threads  programmatic  wait   ended
//   4        1             0      0 of 7
//   4        1             1      7 of 7
//   4        0             0      7 of 7
//   1 or 2   1             0      1 of 1 each
//
// So `StepGraph` (src/generate/graph/mod.rs) waits before it destroys a step.
#include <cuda.h>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#define OK(x) do { CUresult r = (x); if (r) { const char *s; cuGetErrorName(r, &s); printf("%s: %s line %d\n", #x, s, __LINE__); exit(3); } } while (0)
__global__ void work(float *x, int n, int spin) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  float v = x[threadIdx.x + blockIdx.x * blockDim.x];
  for (int i = 0; i < spin; i++) v = v * 0.999f + 1.f;
  x[threadIdx.x + blockIdx.x * blockDim.x] = v;
}
int main(int argc, char **argv) {
  if (argc < 6) return printf("graph_in_flight THREADS ROUNDS PROGRAMMATIC WAIT KERNELS\n"), 2;
  int threads = atoi(argv[1]), rounds = atoi(argv[2]), pdl = atoi(argv[3]), wait = atoi(argv[4]), kernels = atoi(argv[5]), launches = 12;
  OK(cuInit(0)); CUdevice dev; OK(cuDeviceGet(&dev, 0)); CUcontext ctx; OK(cuDevicePrimaryCtxRetain(&ctx, dev)); OK(cuCtxSetCurrent(ctx));
  CUfunction f;
  cudaFuncAttributes loaded;
  cudaFuncGetAttributes(&loaded, work);
  cudaGetFuncBySymbol((cudaFunction_t *)&f, (const void *)work);
  auto body = [&](int t) {
    OK(cuCtxSetCurrent(ctx));
    CUstream s; OK(cuStreamCreate(&s, CU_STREAM_NON_BLOCKING));
    for (int r = 0; r < rounds; r++) {
      CUdeviceptr mem; OK(cuMemAllocAsync(&mem, 1 << 20, s)); OK(cuMemsetD8Async(mem, 0, 1 << 20, s));
      OK(cuStreamSynchronize(s));
      OK(cuStreamBeginCapture(s, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
      int n = 1 << 18, spin = 200 + 40 * (t % 3);
      void *args[] = {&mem, &n, &spin};
      for (int k = 0; k < kernels; k++) {
        CUlaunchAttribute a{}; a.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION; a.value.programmaticStreamSerializationAllowed = 1;
        CUlaunchConfig c{}; c.gridDimX = 1 + (k * 37 + t * 11) % 200; c.gridDimY = c.gridDimZ = 1; c.blockDimX = 256; c.blockDimY = c.blockDimZ = 1; c.hStream = s; c.attrs = &a; c.numAttrs = pdl && k > 0;
        OK(cuLaunchKernelEx(&c, f, args, nullptr));
      }
      CUgraph g; OK(cuStreamEndCapture(s, &g)); CUgraphExec e; OK(cuGraphInstantiateWithFlags(&e, g, 0)); OK(cuGraphUpload(e, s));
      for (int l = 0; l < launches; l++) OK(cuGraphLaunch(e, s));
      if (wait) OK(cuStreamSynchronize(s));
      OK(cuGraphExecDestroy(e)); OK(cuGraphDestroy(g)); OK(cuMemFreeAsync(mem, s));
    }
    OK(cuStreamSynchronize(s));
  };
  std::vector<std::thread> all; for (int t = 0; t < threads; t++) all.emplace_back(body, t);
  for (auto &t : all) t.join();
  printf("threads %d rounds %d programmatic %d wait %d kernels %d: ended\n", threads, rounds, pdl, wait, kernels);
}
