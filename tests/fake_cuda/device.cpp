// Devices of type CUDA without a GPU: their tensors lie in the host's memory, their operators are the CPU's kernels on
// the same memory. Registers what torch's CPU build lacks: CUDAHooks, a device guard (of eight devices, torch's own for
// tests), generators, an allocator of pinned memory, and a fallback for the dispatch key CUDA. Load it before torch.
//
// Three callbacks follow what happens: `on_wait` (the host waits for the device), `on_kernel` (a kernel is put on the
// current stream, with the bytes that it reads and writes), `on_free` (memory is given back).
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using Guard = c10::impl::FakeGuardImpl<DeviceType::CUDA>;

// what: why the host waits
using OnWait = void (*)(const char* what);
// operator (empty: memory is allocated), number of accesses; of each: memory, first byte, last byte + 1, whether written
using OnKernel = void (*)(const char*, int, const uint64_t*, const uint64_t*, const uint64_t*, const int*);
using OnFree = void (*)(uint64_t memory);
OnWait on_wait = nullptr;
OnKernel on_kernel = nullptr;
OnFree on_free = nullptr;

void wait(const std::string& what) {
  if (on_wait != nullptr) on_wait(what.c_str());
}

// ---------------------------------------------------------------- generators

struct CudaGenerator final : c10::GeneratorImpl {
  explicit CudaGenerator(Device device)
      : c10::GeneratorImpl(device, DispatchKeySet(DispatchKey::CUDA)), cpu(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(state.storage()), DispatchKeySet(DispatchKey::CPU), state.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(state.sizes(), state.strides(), state.storage_offset());
    cpu.set_state(tensor);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.get_state().getIntrusivePtr(); }
  CudaGenerator* clone_impl() const override {
    auto* copy = new CudaGenerator(device_);
    copy->cpu = cpu.clone();
    return copy;
  }
  at::Generator cpu;
};

std::array<at::Generator, c10::impl::kFakeGuardImplMaxDevices> default_generators;

// The first one of each device is its default.
at::Generator new_generator(int index) {
  auto made = at::make_generator<CudaGenerator>(Device(DeviceType::CUDA, index));
  if (!default_generators.at(index).defined()) default_generators[index] = made;
  return made;
}

at::Generator& default_generator(int index) {
  if (!default_generators.at(index).defined()) new_generator(index);
  return default_generators[index];
}

at::Generator& on_cpu(const at::Generator& generator) {
  return static_cast<CudaGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

// While it lives, operators of the CPU that take no generator draw from a device's.
struct DrawsOfDevice {
  at::Generator host, &device;
  at::Tensor state;
  explicit DrawsOfDevice(int index)
      : host(at::globalContext().defaultGenerator(Device(DeviceType::CPU))),
        device(on_cpu(default_generator(index))), state(host.get_state()) {
    host.set_state(device.get_state());
  }
  ~DrawsOfDevice() {
    device.set_state(host.get_state());
    host.set_state(state);
  }
};

// ---------------------------------------------------------------- memory of the host and of devices

std::mutex lock;  // of `pinned` and `freed`
std::map<uintptr_t, size_t> pinned;  // address -> bytes
std::vector<uint64_t> freed;
std::atomic<long long> allocated{0}, peak{0};  // bytes, over all devices

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> held(lock);
  auto at = reinterpret_cast<uintptr_t>(data);
  auto next = pinned.upper_bound(at);
  return next != pinned.begin() && at < std::prev(next)->first + std::prev(next)->second;
}

void free_pinned(void* context) {
  auto* data = static_cast<c10::DataPtr*>(context);
  {
    std::lock_guard<std::mutex> held(lock);
    pinned.erase(reinterpret_cast<uintptr_t>(data->get()));
  }
  delete data;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* data = new c10::DataPtr(c10::GetAllocator(DeviceType::CPU)->allocate(bytes));
    std::lock_guard<std::mutex> held(lock);
    if (bytes > 0) pinned[reinterpret_cast<uintptr_t>(data->get())] = bytes;
    return {data->get(), data, &free_pinned, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

// Frees are reported before the next kernel: where they happen, a Python exception may be under way.
void report_freed() {
  std::vector<uint64_t> some;
  {
    std::lock_guard<std::mutex> held(lock);
    some.swap(freed);
  }
  for (auto memory : some) on_free(memory);
}

void free_storage(void* context) {
  auto* host = static_cast<c10::Storage*>(context);
  if (on_free != nullptr && host->nbytes() > 0) {
    std::lock_guard<std::mutex> held(lock);
    freed.push_back(reinterpret_cast<uint64_t>(host->data()));
  }
  allocated -= host->nbytes();
  delete host;
}

// The host's memory as a device's.
c10::Storage device_storage(const c10::Storage& host, int index) {
  long long now = allocated += host.nbytes(), most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
  void* data = const_cast<void*>(host.data());
  if (on_kernel != nullptr && host.nbytes() > 0) {
    report_freed();
    uint64_t memory = reinterpret_cast<uint64_t>(data), none = 0;
    int written = 0;
    on_kernel("", 1, &memory, &none, &none, &written);
  }
  return c10::Storage(
      c10::Storage::use_byte_size_t(), host.nbytes(),
      c10::DataPtr(data, new c10::Storage(host), &free_storage, Device(DeviceType::CUDA, index)), nullptr, false);
}

Tensor with_storage(const c10::Storage& storage, const Tensor& like, DispatchKey key) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), DispatchKeySet(key), like.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) out._set_conj(true);
  if (like.is_neg()) out._set_neg(true);
  return out;
}

// A tensor of the host on the same memory, which it does not own.
Tensor to_host(const Tensor& t) {
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), t.storage().nbytes(),
      c10::DataPtr(const_cast<void*>(t.storage().data()), Device(DeviceType::CPU)),
      c10::GetAllocator(DeviceType::CPU), true);
  return with_storage(storage, t, DispatchKey::CPU);
}

// A fresh tensor of the host as one of a device.
Tensor to_device(const Tensor& t, int index) {
  return with_storage(device_storage(t.storage(), index), t, DispatchKey::CUDA);
}

template <class Function>
void each_tensor(const IValue& value, Function function) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) function(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& t : value.toTensorVector()) function(t);
  } else if (value.isOptionalTensorList()) {
    for (const auto& t : value.toOptionalTensorVector())
      if (t.has_value() && t->defined()) function(*t);
  }
}

// What a kernel reads and writes of devices' memory.
struct Accesses {
  std::vector<uint64_t> memory, first, last;
  std::vector<int> written;
  void add(const Tensor& t, bool write) {
    if (!t.is_cuda() || t.numel() == 0) return;
    uint64_t start = t.storage_offset(), end = start;
    for (int64_t i = 0; i < t.dim(); ++i) end += (t.size(i) - 1) * t.stride(i);
    memory.push_back(reinterpret_cast<uint64_t>(t.storage().data()));
    first.push_back(start * t.element_size());
    last.push_back((end + 1) * t.element_size());
    written.push_back(write);
  }
  void report(const char* name) {
    if (memory.empty()) return;
    report_freed();
    on_kernel(name, memory.size(), memory.data(), first.data(), last.data(), written.data());
  }
};

// ---------------------------------------------------------------- operators

// those that look at results on the host, or give out shapes that depend on values
const std::set<std::string> waiting = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique",
    "aten::_unique2", "aten::unique_consecutive", "aten::equal", "aten::bincount", "aten::histc", "aten::_linalg_svd",
    "aten::_linalg_svd.U", "aten::_linalg_eigh", "aten::_linalg_eigh.eigenvalues",
};
// those whose indices torch itself moves from the CPU
const std::set<std::string> indexing = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_",
};
// those that draw and take no generator
const std::set<std::string> drawing = {"aten::native_dropout"};

struct Call {
  std::string name;
  std::vector<IValue> arguments, on_host;
  std::vector<Tensor> tensors;  // of the device
  int index = -1;  // of the device
};

Tensor on_host(const Tensor& t, Call& call) {
  if (!t.defined() || !t.is_cuda()) return t;
  TORCH_CHECK(
      call.index < 0 || call.index == t.device().index(), call.name,
      ": expected all tensors to be on the same device, but found cuda:", call.index, " and ", t.device());
  call.index = t.device().index();
  call.tensors.push_back(t);
  return to_host(t);
}

IValue on_host(const c10::Argument& argument, const IValue& value, Call& call) {
  if (value.isTensor()) return on_host(value.toTensor(), call);
  if (value.isTensorList()) {
    std::vector<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(on_host(t, call));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector())
      list.push_back(t.has_value() ? std::optional<Tensor>(on_host(*t, call)) : std::nullopt);
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) {
    if (call.index < 0 && value.toDevice().has_index()) call.index = value.toDevice().index();
    return Device(DeviceType::CPU);
  }
  if (argument.name() == "generator") {
    if (value.isNone()) return on_cpu(default_generator(call.index < 0 ? Guard::getDeviceIndex() : call.index));
    TORCH_CHECK(
        value.toGenerator().device().is_cuda(), call.name,
        ": Expected a 'cuda' device type for generator but found 'cpu'");
    return on_cpu(value.toGenerator());
  }
  return value;
}

// Refuses tensors of the CPU among those of a device, but for scalars and indices.
void check_devices(const Call& call) {
  const bool index = indexing.count(call.name) > 0;
  for (const auto& value : call.arguments) {
    each_tensor(value, [&](const Tensor& t) {
      if (call.name == "aten::_index_put_impl_" && value.isOptionalTensorList() &&
          (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte))
        wait(call.name + " by a mask");
      if (t.is_cuda() || t.dim() == 0 || t.is_meta()) return;
      TORCH_CHECK(
          index, call.name, ": expected all tensors to be on the same device, but found cuda:", call.index,
          " and cpu (", t.sizes(), ")");
      wait(call.name + " with an index on the CPU");
    });
  }
}

// A result that is an argument: the device's own tensor, which the operator may have resized.
IValue own_argument(const c10::FunctionSchema& schema, const c10::AliasInfo& alias, const IValue& out, Call& call) {
  for (size_t j = 0; j < call.arguments.size(); ++j) {
    const auto* other = schema.arguments()[j].alias_info();
    if (other == nullptr || !other->isWrite() || other->beforeSets() != alias.beforeSets()) continue;
    if (out.isTensor()) {
      const Tensor &host = call.on_host[j].toTensor(), &own = call.arguments[j].toTensor();
      const bool moved = host.storage().data() != own.storage().data();
      if (moved) own.unsafeGetTensorImpl()->set_storage_keep_dtype(device_storage(host.storage(), call.index));
      if (moved || !host.sizes().equals(own.sizes()))
        own.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
    return call.arguments[j];
  }
  return out;
}

// A result of the host as one of the device: a view of an argument, or new.
Tensor result(const Tensor& t, const Call& call) {
  if (!t.defined()) return t;
  for (const Tensor& known : call.tensors)
    if (t.storage().data() != nullptr && known.storage().data() == t.storage().data())
      return with_storage(known.storage(), t, DispatchKey::CUDA);
  return to_device(t, call.index);
}

void report(const c10::FunctionSchema& schema, const Call& call, const c10::IValue* results) {
  const auto& returns = schema.returns();
  const bool views = !returns.empty() && std::all_of(returns.begin(), returns.end(), [](const c10::Argument& one) {
    return one.alias_info() != nullptr && !one.alias_info()->isWrite();
  });
  if (views) return;  // no kernel
  Accesses accesses;
  for (size_t j = 0; j < call.arguments.size(); ++j) {
    const auto* alias = schema.arguments()[j].alias_info();
    const bool write = alias != nullptr && alias->isWrite();
    each_tensor(call.arguments[j], [&](const Tensor& t) { accesses.add(t, write); });
  }
  for (size_t i = 0; i < returns.size(); ++i)
    if (returns[i].alias_info() == nullptr)
      each_tensor(results[i], [&](const Tensor& t) { accesses.add(t, true); });
  accesses.report(call.name.c_str());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto begin = stack->size() - schema.arguments().size();
  Call call;
  call.name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  call.arguments.assign(stack->begin() + begin, stack->end());
  for (size_t j = 0; j < call.arguments.size(); ++j)
    call.on_host.push_back(on_host(schema.arguments()[j], call.arguments[j], call));
  if (call.index < 0) call.index = Guard::getDeviceIndex();
  check_devices(call);
  if (waiting.count(call.name)) wait(call.name);

  stack->resize(begin);
  for (const auto& value : call.on_host) stack->push_back(value);
  {
    std::optional<DrawsOfDevice> draws;
    if (drawing.count(call.name)) draws.emplace(call.index);
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }

  const auto& returns = schema.returns();
  IValue* results = stack->data() + (stack->size() - returns.size());
  for (size_t i = 0; i < returns.size(); ++i) {
    const auto* alias = returns[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      results[i] = own_argument(schema, *alias, results[i], call);
    } else if (results[i].isTensor()) {
      results[i] = result(results[i].toTensor(), call);
    } else if (results[i].isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& t : results[i].toTensorVector()) list.push_back(result(t, call));
      results[i] = list;
    }
  }
  if (on_kernel != nullptr) report(schema, call, results);
}

int index_of(std::optional<Device> device) {
  return device && device->has_index() ? device->index() : Guard::getDeviceIndex();
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto options = at::TensorOptions().dtype(dtype).device(at::kCPU);
  return to_device(at::empty(C10_AS_INTARRAYREF_SLOW(size), options, format), index_of(device));
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  auto options = at::TensorOptions().dtype(dtype).device(at::kCPU);
  auto host = at::empty_strided(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), options);
  return to_device(host, index_of(device));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (on_kernel != nullptr) {
    Accesses accesses;
    accesses.add(source, false);
    accesses.add(self, true);
    accesses.report("aten::copy_");
  }
  if (self.is_cuda() != source.is_cuda()) {
    const bool up = self.is_cuda();
    const Tensor& host = up ? source : self;
    // CUDA copies ordinary memory by way of its own buffers, which it waits for
    if (!non_blocking || !is_pinned(host.storage().data()))
      wait(std::string(up ? "copy to the device" : "copy to the host") + (non_blocking ? ", not pinned" : ""));
  }
  Tensor to = self.is_cuda() ? to_host(self) : self;
  to.copy_(source.is_cuda() ? to_host(source) : source);
  return self;
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto entries = c10::multiply_integers(sizes);
  auto* impl = self.unsafeGetTensorImpl();
  if (static_cast<size_t>(entries) * self.element_size() > self.storage().nbytes()) {
    auto host = at::empty({entries}, self.options().device(at::kCPU));
    impl->set_storage_keep_dtype(device_storage(host.storage(), self.device().index()));
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_storage(
    Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

// Products in a wider format, which the CPU does not have.
Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType dtype) { return at::mm(a.to(dtype), b.to(dtype)); }

Tensor& mm_dtype_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  return out.copy_(mm_dtype(a, b, dtype));
}

Tensor addmm_dtype(
    const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
    const at::Scalar& alpha) {
  return at::addmm(self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
}

Tensor& addmm_dtype_out(
    const Tensor& self, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
    const at::Scalar& alpha, Tensor& out) {
  return out.copy_(addmm_dtype(self, a, b, dtype, beta, alpha));
}

// Which attention: the one made of products.
int64_t attention_choice(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// The CPU has no kernel for products that are summed in a wider type.
Tensor& addmm_wide(
    const Tensor& total, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta, const at::Scalar& alpha,
    Tensor& out) {
  return out.copy_(at::addmm(total.to(dtype), a.to(dtype), b.to(dtype), beta, alpha));
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("addmm.dtype_out", &addmm_wide);
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("mm.dtype", &mm_dtype);
  m.impl("mm.dtype_out", &mm_dtype_out);
  m.impl("addmm.dtype", &addmm_dtype);
  m.impl("addmm.dtype_out", &addmm_dtype_out);
  m.impl("_fused_sdp_choice", &attention_choice);
}

// ---------------------------------------------------------------- the device

const Guard guard;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return guard.deviceCount(); }
  c10::DeviceIndex deviceCount() const override { return guard.deviceCount(); }
  c10::DeviceIndex current_device() const override { return Guard::getDeviceIndex(); }
  c10::DeviceIndex getCurrentDevice() const override { return Guard::getDeviceIndex(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard::setDeviceIndex(index); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return new_generator(index < 0 ? Guard::getDeviceIndex() : index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index < 0 ? Guard::getDeviceIndex() : index);
  }
};

c10::Registerer<std::string, std::unique_ptr<at::CUDAHooksInterface>, at::CUDAHooksArgs> registered(
    "CUDAHooks", at::CUDAHooksRegistry(), [](at::CUDAHooksArgs arguments) -> std::unique_ptr<at::CUDAHooksInterface> {
      return std::make_unique<Hooks>(arguments);
    });

}  // namespace

extern "C" {
// Whether torch now believes in CUDA: false where it had looked for it before.
bool fake_cuda_register() {
  if (!c10::impl::hasDeviceGuardImpl(DeviceType::CUDA)) c10::impl::registerDeviceGuard(DeviceType::CUDA, &guard);
  return at::detail::getCUDAHooks().hasCUDA();
}
void fake_cuda_follow(OnWait waits, OnKernel kernels, OnFree frees) {
  on_wait = waits;
  on_kernel = kernels;
  on_free = frees;
}
long long fake_cuda_allocated() { return allocated; }
long long fake_cuda_peak() { return peak; }
void fake_cuda_reset_peak() { peak = allocated.load(); }
}
