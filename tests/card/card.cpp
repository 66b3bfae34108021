// A CUDA device of torch's dispatcher whose memory is the host's and whose kernels are the CPU's.
//
// An operator on its tensors is the CPU's on the same bytes (`run_on_cpu`). As on a card, tensors of
// two devices do not mix, each allocation counts in blocks of 512 bytes, the host waits where it
// reads a number or copies memory that is not pinned, and a recorded graph is its kernels on the
// addresses that they had. Kernels are done in order and at once: streams show nothing here.

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::Storage;
using MaybeTensor = std::optional<Tensor>;
using Sizes = c10::IntArrayRef;

const Device CARD(c10::DeviceType::CUDA, 0);
const Device CPU(c10::DeviceType::CPU);

// ---------------------------------------------------------------------------------------- memory

std::atomic<int64_t> used{0}, peak{0}, limit{INT64_MAX};

struct Block {  // of the card; owns memory of the host, or a tensor that does
  int64_t size;
  c10::DataPtr memory;
  Tensor tensor;
};

c10::DataPtr counted(void* data, size_t bytes, c10::DataPtr memory, Tensor tensor) {
  int64_t size = (static_cast<int64_t>(bytes) + 511) / 512 * 512;
  TORCH_CHECK_WITH(OutOfMemoryError, used + size <= limit, "CUDA out of memory. Tried to allocate ",
                   size, " bytes; ", used, " of ", limit, " are allocated");
  int64_t now = used += size, most = peak;
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
  auto* block = new Block{size, std::move(memory), std::move(tensor)};
  auto free = [](void* place) {
    auto* old = static_cast<Block*>(place);
    used -= old->size;
    delete old;
  };
  return {data, block, free, CARD};
}

struct CardMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = c10::GetCPUAllocator()->allocate(bytes);
    void* data = memory.get();
    return counted(data, bytes, std::move(memory), {});
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} card_memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &card_memory);

std::mutex pins_mutex;
std::map<const char*, size_t> pins;  // start of pinned memory -> its bytes

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pins_mutex);
  auto place = static_cast<const char*>(data);
  auto after = pins.upper_bound(place);
  return after != pins.begin() && place < std::prev(after)->first + std::prev(after)->second;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    std::lock_guard<std::mutex> lock(pins_mutex);
    pins[static_cast<const char*>(memory->get())] = bytes;
    auto free = [](void* place) {
      auto* old = static_cast<c10::DataPtr*>(place);
      std::lock_guard<std::mutex> lock(pins_mutex);
      pins.erase(static_cast<const char*>(old->get()));
      delete old;
    };
    return {memory->get(), memory, free, CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} pinned_memory;

c10::DispatchKeySet card_keys() { return c10::DispatchKeySet(c10::DispatchKey::CUDA); }

Tensor alike(const Tensor& tensor, Storage storage, c10::DispatchKeySet keys) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return out;
}

Tensor as_cpu(const Tensor& tensor) {  // the same bytes as a tensor of the CPU
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto free = [](void* held) { delete static_cast<Storage*>(held); };
  auto* held = new Storage(tensor.storage());
  c10::DataPtr data(held->mutable_data(), held, free, CPU);
  Storage storage(Storage::use_byte_size_t(), held->nbytes(), std::move(data),
                  c10::GetCPUAllocator(), true);
  auto out = alike(tensor, storage, c10::DispatchKeySet(c10::DispatchKey::CPU));
  if (tensor.is_conj()) out._set_conj(true);
  if (tensor.is_neg()) out._set_neg(true);
  return out;
}

Tensor as_card(const Tensor& tensor) {  // a fresh tensor of the CPU as one of the card
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  size_t bytes = tensor.storage().nbytes();
  auto data = counted(tensor.storage().mutable_data(), bytes, {}, tensor);
  Storage storage(Storage::use_byte_size_t(), bytes, std::move(data), &card_memory, true);
  return alike(tensor, storage, card_keys());
}

// -------------------------------------------------------------------------- recordings and waits

struct Kernel {
  c10::OperatorHandle op;
  std::vector<IValue> args;    // of the CPU
  std::vector<Tensor> results; // those of its own, where the others expect them
};

std::vector<std::vector<Kernel>> recordings;
bool recording = false;
std::atomic<bool> strict{false};

void record(const c10::OperatorHandle& op, std::vector<IValue> args, std::vector<Tensor> results) {
  if (recording) recordings.back().push_back({op, std::move(args), std::move(results)});
}

void host_waits(const std::string& what) {
  TORCH_CHECK(!recording, "CUDA error: operation not permitted when stream is capturing: ", what);
  TORCH_CHECK(!strict, "called a synchronizing CUDA operation: ", what);
}

template <typename Do>
void each_tensor(const IValue& value, Do act) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) act(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef()) each_tensor(item, act);
  }
}

bool is_result(const c10::Argument& result) {  // not one of the arguments, written in place
  return !(result.alias_info() && result.alias_info()->isWrite());
}

void replay(int64_t index) {
  for (auto& kernel : recordings[index]) {
    torch::jit::Stack stack(kernel.args.begin(), kernel.args.end());
    kernel.op.callBoxed(&stack);
    auto place = kernel.results.begin();
    const auto& returns = kernel.op.schema().returns();
    for (size_t i = 0; i < returns.size() && place != kernel.results.end(); i++)
      if (is_result(returns[i]))
        each_tensor(stack[i], [&](const Tensor& found) { (place++)->copy_(found); });
  }
}

// ----------------------------------------------------------------------------------- any operator

IValue converted(const IValue& value, Tensor (*change)(const Tensor&)) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& tensor : value.toTensorList()) out.push_back(change(tensor));
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<MaybeTensor> out;
    for (const IValue& item : value.toListRef())
      out.push_back(item.isNone() ? MaybeTensor() : MaybeTensor(change(item.toTensor())));
    return out;
  }
  return value;
}

const std::set<std::string> MIXING{  // a card's operators that take indices of the CPU
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
const std::set<std::string> WAITING{  // the size of whose results is known to the card alone
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave"};

void check_devices(const c10::FunctionSchema& schema, const std::vector<IValue>& args) {
  if (WAITING.count(schema.name())) host_waits(schema.name());
  for (const IValue& arg : args) {
    TORCH_CHECK(!arg.isGenerator(), "Expected a 'cuda' generator in ", schema.name());
    each_tensor(arg, [&](const Tensor& tensor) {
      bool number = tensor.dim() == 0;  // which a kernel takes by value
      TORCH_CHECK(tensor.is_cuda() || number || MIXING.count(schema.name()),
                  "Expected all tensors to be on the same device, but ", schema.name(),
                  " has one on cuda:0 and one on cpu, of shape ", tensor.sizes());
      bool looked_up = tensor.is_cpu() || tensor.scalar_type() == at::kBool;  // as an index
      if (MIXING.count(schema.name()) && looked_up && !number) host_waits(schema.name());
      TORCH_CHECK(!recording || tensor.is_cuda() || number,
                  "CUDA error: a recorded ", schema.name(), " reads memory of the host");
    });
  }
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  size_t count = schema.arguments().size();
  std::vector<IValue> args(stack->end() - count, stack->end()), cpu_args;
  torch::jit::drop(*stack, count);
  check_devices(schema, args);
  for (const IValue& arg : args)
    cpu_args.push_back(arg.isDevice() ? IValue(CPU) : converted(arg, as_cpu));
  torch::jit::Stack inner(cpu_args.begin(), cpu_args.end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &inner);

  std::vector<Tensor> results;
  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); i++) {
    if (is_result(returns[i])) {
      each_tensor(inner[i], [&](const Tensor& tensor) { results.push_back(tensor); });
      torch::jit::push(stack, converted(inner[i], as_card));
      continue;
    }
    for (size_t k = 0; k < count; k++) {
      const auto* alias = schema.arguments()[k].alias_info();
      if (!alias || !(*alias == *returns[i].alias_info())) continue;
      if (args[k].isTensor() && args[k].toTensor().sizes() != cpu_args[k].toTensor().sizes()) {
        args[k].toTensor().resize_(cpu_args[k].toTensor().sizes());
        as_cpu(args[k].toTensor()).copy_(cpu_args[k].toTensor());
      }
      torch::jit::push(stack, args[k]);
      break;
    }
  }
  record(op, cpu_args, results);
}

// ------------------------------------------------------- operators that the card has of its own

Tensor empty(Sizes size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto kind = c10::dtype_or_default(dtype);
  return at::detail::empty_generic(size, &card_memory, card_keys(), kind, format);
}

Tensor empty_strided(Sizes size, Sizes stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  auto kind = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(size, stride, &card_memory, card_keys(), kind);
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.is_cuda()) {
    bool waits = !non_blocking || !is_pinned(self.storage().data());
    if (waits && self.numel()) host_waits("a copy to the host");
  } else if (!source.is_cuda() && source.numel()) {
    bool waits = !non_blocking || !is_pinned(source.storage().data());
    if (waits) host_waits("a copy from memory of the host that is not pinned, or that blocks");
  }
  auto to = as_cpu(self), from = as_cpu(source);
  to.copy_(from);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  record(op, {to, from, false}, {});
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, source, non_blocking);
}

at::Scalar item(const Tensor& tensor) {
  host_waits("item");
  return as_cpu(tensor).item();
}

bool equal(const Tensor& a, const Tensor& b) {
  host_waits("equal");
  return as_cpu(a).equal(as_cpu(b));
}

Tensor nonzero(const Tensor& tensor) {
  host_waits("nonzero");
  return as_card(as_cpu(tensor).nonzero());
}

Tensor masked_select(const Tensor& tensor, const Tensor& mask) {
  host_waits("masked_select");
  return as_card(as_cpu(tensor).masked_select(as_cpu(mask)));
}

Tensor as_strided(const Tensor& tensor, Sizes size, Sizes stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}

Tensor& set_storage(Tensor& self, Storage storage, int64_t offset, Sizes size, Sizes stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

Tensor& set_whole(Tensor& self, Storage storage) {
  int64_t count = storage.nbytes() / self.dtype().itemsize();
  return self.set_(std::move(storage), 0, count, {});
}

Tensor& set_empty(Tensor& self) {
  return self.set_(Storage(Storage::use_byte_size_t(), 0, &card_memory, true), 0, {0}, {});
}

void resize(c10::StorageImpl* storage, size_t bytes) {
  auto fresh = card_memory.allocate(bytes);
  if (size_t kept = std::min(bytes, storage->nbytes()))
    std::memcpy(fresh.get(), storage->mutable_data(), kept);
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

const Tensor& resize_(const Tensor& self, Sizes size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t bytes = (impl->storage_offset() + impl->numel()) * self.dtype().itemsize();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) resize(storage, bytes);
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

void record_stream(Tensor&, c10::Stream) {}

// Attention that keeps no matrix of weights, as a card has it: with a mask "memory-efficient" (2),
// without "flash" (1); both are the CPU's.
using Scale = std::optional<double>;

int64_t backend(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor& mask, double, bool,
                Scale, bool) {
  return mask ? 2 : 1;
}
[[maybe_unused]] const bool chosen =
    (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&backend), true);

auto flash(const Tensor& q, const Tensor& k, const Tensor& v, double p, bool causal, bool,
           Scale scale) {
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, p, causal, {}, scale);
  auto none = at::empty({0}, q.options().dtype(at::kLong));
  return std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor,
                    Tensor>(out, sums, {}, {}, q.size(2), k.size(2), none, none, none);
}

auto flash_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&,
                    c10::SymInt, c10::SymInt, double p, bool causal, const Tensor&, const Tensor&,
                    Scale scale) {
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, sums, p,
                                                                  causal, {}, scale);
}

auto efficient(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask, bool,
               double p, bool causal, Scale scale) {
  auto [out, sums] =
      at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, p, causal, mask, scale);
  auto none = at::empty({0}, q.options().dtype(at::kLong));
  return std::tuple<Tensor, Tensor, Tensor, Tensor>(out, sums, none, none);
}

auto efficient_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& mask, const Tensor& out, const Tensor& sums, const Tensor&,
                        const Tensor&, double p, std::array<bool, 4>, bool causal, Scale scale) {
  auto given = mask.defined() ? MaybeTensor(mask) : MaybeTensor();
  auto [of_q, of_k, of_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad, q, k, v, out, sums, p, causal, given, scale);
  return std::tuple<Tensor, Tensor, Tensor, Tensor>(of_q, of_k, of_v, {});
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  m.impl("equal", equal);
  m.impl("nonzero", nonzero);
  m.impl("masked_select", masked_select);
  m.impl("as_strided", as_strided);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", set_empty);
  m.impl("resize_", resize_);
  m.impl("record_stream", record_stream);
  // one kernel, as a card has it, and not the operators of which it could be made
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  m.impl("_scaled_dot_product_flash_attention", flash);
  m.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  m.impl("_scaled_dot_product_efficient_attention", efficient);
  m.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward);
}

// ------------------------------------------------------------------ the device, as torch asks for it

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CARD; }
  Device getDevice() const override { return CARD; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, CARD); }
  c10::Stream getNewStream(Device, int) const override { return getStream(CARD); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(CARD); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &card_memory; }
  Device getDeviceFromPtr(void*) const override { return CARD; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);
}

extern "C" {  // for tests/card/device.py
int64_t card_used() { return used; }
int64_t card_peak() { return peak; }
void card_reset_peak() { peak = used.load(); }
void card_limit(int64_t bytes) { limit = bytes; }
void card_strict(int64_t on) { strict = on; }
void card_record() {
  recordings.emplace_back();
  recording = true;
}
int64_t card_recorded() {
  recording = false;
  return recordings.size() - 1;
}
void card_forget(int64_t index) { recordings[index].clear(); }
int64_t card_recording() { return recording; }
void card_resize(int64_t storage, int64_t bytes) {
  resize(reinterpret_cast<c10::StorageImpl*>(storage), bytes);
}
int64_t card_replay(int64_t index) {
  try {
    at::NoGradGuard guard;
    replay(index);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
}
