// A libcuda.so.1 on host memory, so that the real cuda-bindings can be called where there is no GPU: what is
// under test is how arguments and results pass through them. Everything runs at once. Compiled against the
// toolkit's cuda.h, which checks every signature. Kernels are run by a callback into Python.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

using Work = std::function<void()>;

struct Stream { bool own = false; };
struct Event { bool timing = true, recorded = false; };
struct Graph { std::vector<Work> work; };
struct Module { std::string image; };
struct Function { std::string name; size_t params = 0; };

std::recursive_mutex lock;
std::map<CUdeviceptr, size_t> memory;
std::map<void *, size_t> pinned;
std::map<CUstream, Stream *> streams;
std::map<CUevent, Event *> events;
std::map<CUgraph, Graph *> graphs;
std::map<CUgraphExec, Graph *> executables;
std::map<CUmodule, Module *> modules;
std::map<CUstream, Graph *> capturing;
int retained = 0;
bool initialised = false;
thread_local std::vector<CUcontext> contexts;  // a thread's stack
char primary;                                  // its address is the context's handle
char pool;

int (*param_bytes)(const char *entry) = nullptr;
void (*run_kernel)(const char *entry, const void *params) = nullptr;

long setting(const char *name, long otherwise) {
  const char *text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}
size_t total() { return setting("FAKE_CUDA_MEMORY", 1 << 30); }
size_t used() {
  size_t bytes = 0;
  for (auto &[address, size] : memory) bytes += size;
  return bytes;
}
bool pools() { return setting("FAKE_CUDA_POOLS", 1) != 0; }
CUcontext context() { return reinterpret_cast<CUcontext>(&primary); }
bool current() { return !contexts.empty() && contexts.back() == context(); }
bool holds(CUdeviceptr address, size_t bytes) {
  for (auto &[start, size] : memory)
    if (start <= address && address + bytes <= start + size) return true;
  return false;
}
CUresult put(CUstream stream, Work work) {
  if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
  auto capture = capturing.find(stream);
  if (capture == capturing.end() && !streams.count(stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (capture == capturing.end()) work();
  else capture->second->work.push_back(work);
  return CUDA_SUCCESS;
}
CUresult waiting() {
  if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
  return capturing.empty() ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
CUresult allocate(CUdeviceptr *address, size_t bytes) {
  if (!bytes) return CUDA_ERROR_INVALID_VALUE;
  if (bytes > total() - used()) return CUDA_ERROR_OUT_OF_MEMORY;
  void *block = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(block, 0xCD, bytes);
  *address = reinterpret_cast<CUdeviceptr>(block);
  memory[*address] = bytes;
  return CUDA_SUCCESS;
}
CUresult release(CUdeviceptr address) {
  if (!memory.count(address)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(reinterpret_cast<void *>(address), 0xFF, memory[address]);
  std::free(reinterpret_cast<void *>(address));
  memory.erase(address);
  return CUDA_SUCCESS;
}

}  // namespace

#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)
#define API extern "C" CUresult CUDAAPI
// Only what is marked so is found by name. NVRTC would take a library with a cuInit for a whole driver.
#define VISIBLE extern "C" __attribute__((visibility("default")))

VISIBLE void fake_set_kernels(int (*bytes)(const char *), void (*run)(const char *, const void *)) {
  param_bytes = bytes;
  run_kernel = run;
}
// What has to be given back and was not.
VISIBLE int fake_live(const char *kind) {
  std::map<std::string, size_t> sizes = {
      {"allocations", memory.size()}, {"pinned", pinned.size()},   {"events", events.size()},
      {"graphs", graphs.size()},      {"modules", modules.size()}, {"executables", executables.size()},
      {"streams", streams.size()},    {"contexts", size_t(retained)}};
  return sizes.count(kind) ? int(sizes[kind]) : -1;
}

API cuInit(unsigned int) {
  if (!setting("FAKE_CUDA_DEVICES", 1)) return CUDA_ERROR_NO_DEVICE;
  initialised = true;
  return CUDA_SUCCESS;
}
API cuDriverGetVersion(int *version) {
  *version = int(setting("FAKE_CUDA_VERSION", CUDA_VERSION));
  return CUDA_SUCCESS;
}
API cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "a made-up error";
  return CUDA_SUCCESS;
}
API cuGetErrorName(CUresult, const char **text) {
  *text = "CUDA_ERROR_MADE_UP";
  return CUDA_SUCCESS;
}
API cuDeviceGetCount(int *count) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  *count = int(setting("FAKE_CUDA_DEVICES", 1));
  return CUDA_SUCCESS;
}
API cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
API cuDeviceGetName(char *name, int length, CUdevice) {
  std::strncpy(name, "Fake GPU", length);
  return CUDA_SUCCESS;
}
API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = int(setting("FAKE_CUDA_CAPABILITY", 90)) / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = int(setting("FAKE_CUDA_CAPABILITY", 90)) % 10; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = pools(); break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRetain(CUcontext *result, CUdevice) {
  LOCKED;
  ++retained;
  *result = context();
  return CUDA_SUCCESS;
}
API cuDevicePrimaryCtxRelease(CUdevice) {
  LOCKED;
  return retained-- > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
API cuCtxSetCurrent(CUcontext given) {
  if (!contexts.empty()) contexts.pop_back();
  if (given) contexts.push_back(given);
  return CUDA_SUCCESS;
}
API cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return current() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
API cuCtxPushCurrent(CUcontext given) {
  contexts.push_back(given);
  return CUDA_SUCCESS;
}
API cuCtxPopCurrent(CUcontext *result) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *result = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}
API cuDeviceGetMemPool(CUmemoryPool *result, CUdevice) {
  *result = reinterpret_cast<CUmemoryPool>(&pool);
  return pools() ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}
API cuMemPoolTrimTo(CUmemoryPool given, size_t) {
  return given == reinterpret_cast<CUmemoryPool>(&pool) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API cuMemGetInfo(size_t *free, size_t *all) {
  LOCKED;
  *free = total() - used();
  *all = total();
  return current() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
API cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
  LOCKED;
  if (!pools()) return CUDA_ERROR_NOT_SUPPORTED;
  if (capturing.count(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return current() ? allocate(address, bytes) : CUDA_ERROR_INVALID_CONTEXT;
}
API cuMemAlloc(CUdeviceptr *address, size_t bytes) {
  LOCKED;
  CUresult allowed = waiting();
  return allowed ? allowed : allocate(address, bytes);
}
API cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  LOCKED;
  if (capturing.count(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return pools() && current() ? release(address) : CUDA_ERROR_INVALID_CONTEXT;
}
API cuMemFree(CUdeviceptr address) {
  LOCKED;
  CUresult allowed = waiting();
  return allowed ? allowed : release(address);
}
API cuMemHostAlloc(void **address, size_t bytes, unsigned int) {
  LOCKED;
  *address = std::malloc(bytes);
  pinned[*address] = bytes;
  return waiting();
}
API cuMemFreeHost(void *address) {
  LOCKED;
  if (!pinned.erase(address)) return CUDA_ERROR_INVALID_VALUE;
  std::free(address);
  return waiting();
}
API cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t bytes, CUstream stream) {
  LOCKED;
  if (!holds(address, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream, [=] { std::memset(reinterpret_cast<void *>(address), value, bytes); });
}
API cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t bytes, CUstream stream) {
  LOCKED;
  if (!holds(target, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream, [=] { std::memcpy(reinterpret_cast<void *>(target), source, bytes); });
}
API cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t bytes, CUstream stream) {
  LOCKED;
  if (!holds(source, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream, [=] { std::memcpy(target, reinterpret_cast<void *>(source), bytes); });
}
API cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
  LOCKED;
  if (!holds(target, bytes) || !holds(source, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream,
             [=] { std::memcpy(reinterpret_cast<void *>(target), reinterpret_cast<void *>(source), bytes); });
}
API cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr address) {
  LOCKED;
  if (attribute != CU_POINTER_ATTRIBUTE_CONTEXT || !holds(address, 1)) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUcontext *>(data) = pools() ? nullptr : context();
  return CUDA_SUCCESS;
}
API cuStreamCreate(CUstream *stream, unsigned int flags) {
  LOCKED;
  if (!current() || flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_CONTEXT;
  auto *made = new Stream{true};
  *stream = reinterpret_cast<CUstream>(made);
  streams[*stream] = made;
  return CUDA_SUCCESS;
}
API cuStreamDestroy(CUstream stream) {
  LOCKED;
  auto found = streams.find(stream);
  if (found == streams.end()) return CUDA_ERROR_INVALID_HANDLE;
  delete found->second;
  streams.erase(found);
  return CUDA_SUCCESS;
}
API cuStreamGetCtx(CUstream stream, CUcontext *result) {
  LOCKED;
  *result = context();
  return streams.count(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
API cuStreamSynchronize(CUstream stream) {
  LOCKED;
  if (!streams.count(stream)) return CUDA_ERROR_INVALID_HANDLE;
  return waiting();
}
API cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  LOCKED;
  if (flags || !events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
  return stream == CU_STREAM_LEGACY || streams.count(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
API cuEventCreate(CUevent *event, unsigned int flags) {
  LOCKED;
  auto *made = new Event{(flags & CU_EVENT_DISABLE_TIMING) == 0};
  *event = reinterpret_cast<CUevent>(made);
  events[*event] = made;
  return current() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
API cuEventDestroy(CUevent event) {
  LOCKED;
  auto found = events.find(event);
  if (found == events.end()) return CUDA_ERROR_INVALID_HANDLE;
  delete found->second;
  events.erase(found);
  return CUDA_SUCCESS;
}
API cuEventRecord(CUevent event, CUstream stream) {
  LOCKED;
  if (!events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
  if (stream != CU_STREAM_LEGACY && !streams.count(stream)) return CUDA_ERROR_INVALID_HANDLE;
  events[event]->recorded = true;
  return CUDA_SUCCESS;
}
API cuEventQuery(CUevent event) {
  LOCKED;
  static int asked = 0;
  if (!events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
  return ++asked % 2 ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;  // both answers happen
}
API cuEventSynchronize(CUevent event) {
  LOCKED;
  return events.count(event) ? waiting() : CUDA_ERROR_INVALID_HANDLE;
}
API cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
  LOCKED;
  if (!events.count(start) || !events.count(end)) return CUDA_ERROR_INVALID_HANDLE;
  if (!events[start]->timing || !events[end]->timing || !events[start]->recorded || !events[end]->recorded)
    return CUDA_ERROR_INVALID_HANDLE;
  *milliseconds = 1.5f;
  return CUDA_SUCCESS;
}
API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
  thread_local CUstreamCaptureMode now = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::swap(now, *mode);
  return CUDA_SUCCESS;
}
API cuModuleLoadData(CUmodule *module, const void *image) {
  LOCKED;
  if (std::memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  auto *made = new Module;
  *module = reinterpret_cast<CUmodule>(made);
  modules[*module] = made;
  return current() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
API cuModuleUnload(CUmodule module) {
  LOCKED;
  auto found = modules.find(module);
  if (found == modules.end()) return CUDA_ERROR_INVALID_HANDLE;
  delete found->second;
  modules.erase(found);
  return CUDA_SUCCESS;
}
API cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  LOCKED;
  if (!modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
  int bytes = param_bytes(name);
  if (bytes < 0) return CUDA_ERROR_NOT_FOUND;
  static std::map<std::string, Function> functions;  // never given back, as in the driver
  *function = reinterpret_cast<CUfunction>(&(functions[name] = Function{name, size_t(bytes)}));
  return CUDA_SUCCESS;
}
API cuLaunchKernel(CUfunction function, unsigned int grid, unsigned int grid_y, unsigned int grid_z,
                   unsigned int block, unsigned int block_y, unsigned int block_z, unsigned int shared,
                   CUstream stream, void **params, void **extra) {
  auto *called = reinterpret_cast<Function *>(function);
  if (!grid || !block || grid_y * grid_z * block_y * block_z != 1 || shared || extra || !params)
    return CUDA_ERROR_INVALID_VALUE;
  std::string copied(static_cast<const char *>(params[0]), called->params);
  return put(stream, [=] { run_kernel(called->name.c_str(), copied.data()); });
}
API cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  LOCKED;
  if (!streams.count(stream) || mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  if (capturing.count(stream)) return CUDA_ERROR_ILLEGAL_STATE;
  capturing[stream] = new Graph;
  return CUDA_SUCCESS;
}
API cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  LOCKED;
  auto found = capturing.find(stream);
  if (found == capturing.end()) return CUDA_ERROR_ILLEGAL_STATE;
  *graph = reinterpret_cast<CUgraph>(found->second);
  graphs[*graph] = found->second;
  capturing.erase(found);
  return CUDA_SUCCESS;
}
API cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
  LOCKED;
  if (flags || !graphs.count(graph)) return CUDA_ERROR_INVALID_VALUE;
  auto *made = new Graph(*graphs[graph]);
  *executable = reinterpret_cast<CUgraphExec>(made);
  executables[*executable] = made;
  return CUDA_SUCCESS;
}
API cuGraphDestroy(CUgraph graph) {
  LOCKED;
  auto found = graphs.find(graph);
  if (found == graphs.end()) return CUDA_ERROR_INVALID_VALUE;
  delete found->second;
  graphs.erase(found);
  return CUDA_SUCCESS;
}
API cuGraphUpload(CUgraphExec executable, CUstream stream) {
  LOCKED;
  return executables.count(executable) && streams.count(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  if (!executables.count(executable) || !current()) return CUDA_ERROR_INVALID_VALUE;
  for (auto &work : executables[executable]->work) put(stream, work);
  return CUDA_SUCCESS;
}
API cuGraphExecDestroy(CUgraphExec executable) {
  LOCKED;
  auto found = executables.find(executable);
  if (found == executables.end()) return CUDA_ERROR_INVALID_VALUE;
  delete found->second;
  executables.erase(found);
  return CUDA_SUCCESS;
}

// cuda.h names the current version of a function by a macro, as the callers of cuGetProcAddress do not.
#define ENTRY(name) {#name, reinterpret_cast<void *>(name)}
#undef cuGetProcAddress
VISIBLE CUresult CUDAAPI cuGetProcAddress_v2(const char *symbol, void **function, int, cuuint64_t,
                                             CUdriverProcAddressQueryResult *status) {
  static const std::map<std::string, void *> table = {
      ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuGetErrorString), ENTRY(cuGetErrorName),
      ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetName), ENTRY(cuDeviceGetAttribute),
      ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuDevicePrimaryCtxRelease), ENTRY(cuCtxSetCurrent),
      ENTRY(cuCtxGetDevice), ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent), ENTRY(cuDeviceGetMemPool),
      ENTRY(cuMemPoolTrimTo), ENTRY(cuMemGetInfo), ENTRY(cuMemAllocAsync), ENTRY(cuMemAlloc), ENTRY(cuMemFreeAsync),
      ENTRY(cuMemFree), ENTRY(cuMemHostAlloc), ENTRY(cuMemFreeHost), ENTRY(cuMemsetD8Async),
      ENTRY(cuMemcpyHtoDAsync), ENTRY(cuMemcpyDtoHAsync), ENTRY(cuMemcpyDtoDAsync), ENTRY(cuPointerGetAttribute),
      ENTRY(cuStreamCreate), ENTRY(cuStreamDestroy), ENTRY(cuStreamGetCtx), ENTRY(cuStreamSynchronize),
      ENTRY(cuStreamWaitEvent), ENTRY(cuEventCreate), ENTRY(cuEventDestroy), ENTRY(cuEventRecord),
      ENTRY(cuEventQuery), ENTRY(cuEventSynchronize), ENTRY(cuEventElapsedTime),
      ENTRY(cuThreadExchangeStreamCaptureMode), ENTRY(cuModuleLoadData), ENTRY(cuModuleUnload),
      ENTRY(cuModuleGetFunction), ENTRY(cuLaunchKernel), ENTRY(cuStreamBeginCapture), ENTRY(cuStreamEndCapture),
      ENTRY(cuGraphInstantiateWithFlags), ENTRY(cuGraphDestroy), ENTRY(cuGraphUpload), ENTRY(cuGraphLaunch),
      ENTRY(cuGraphExecDestroy), ENTRY(cuGetProcAddress_v2)};
  std::string name = symbol;
  if (name == "cuGetProcAddress") name = "cuGetProcAddress_v2";
  if (name == "cuGraphInstantiate") name = "cuGraphInstantiateWithFlags";
  auto found = table.find(name);
  *function = found == table.end() ? nullptr : found->second;
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
