// A device of its own that lives in the CPU's memory and refuses to be mixed with the CPU.
//
// It stands in for a GPU where there is none: every operation runs on a copy on the CPU and brings its results back,
// and one that takes tensors of both devices, or draws with a generator of the other, fails, as it would on a GPU.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr auto kStrict = c10::DeviceType::PrivateUse1;
const c10::Device only(kStrict, 0);

// ---------------------------------------------------------------------------------- what PyTorch asks of a device

c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kStrict;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kStrict; }
  c10::Device exchangeDevice(c10::Device) const override { return only; }
  c10::Device getDevice() const override { return only; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

void release(void* memory) { c10::free_cpu(memory); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = size ? c10::alloc_cpu(size) : nullptr;
    return {memory, memory, &release, only};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(kStrict, &memory);

// ------------------------------------------------------------------------------------ tensors: made, copied, viewed

const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);

Tensor on_cpu(const Tensor& tensor) {  // the same memory as a tensor of the CPU
  if (tensor.device().type() != kStrict) return tensor;
  const auto& storage = tensor.storage();
  const auto size = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  const auto all = at::from_blob(storage.mutable_data(), {size}, at::TensorOptions().dtype(tensor.dtype()));
  return all.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor brought(const Tensor& tensor) { return tensor.defined() ? tensor.to(only) : tensor; }

Tensor empty_like_format(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_with_strides(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.numel()) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar scalar_of(const Tensor& tensor) { return at::_local_scalar_dense(on_cpu(tensor)); }

const Tensor& resized(const Tensor& tensor, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto& storage = tensor.storage();
  const auto needed = (tensor.storage_offset() + c10::multiply_integers(size)) * tensor.itemsize();
  if (needed > storage.nbytes()) {
    auto fresh = memory.allocate(needed);
    if (storage.nbytes()) std::memcpy(fresh.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(needed);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return at::native::set_storage_cpu_(tensor, storage, 0, {size}, {});
}

Tensor unfolded(const Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  const auto at_dimension = at::maybe_wrap_dim(dimension, tensor.dim(), true);
  auto sizes = tensor.sizes().vec(), strides = tensor.strides().vec();
  sizes[at_dimension] = (sizes[at_dimension] - size) / step + 1;
  sizes.push_back(size);
  strides.push_back(strides[at_dimension]);
  strides[at_dimension] *= step;
  return tensor.as_strided(sizes, strides);
}

// --------------------------------------------------------------------------------------------------- operations

const std::set<std::string> may_mix = {  // what a GPU's tensors do with the CPU's: copies, and indices
    "aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

struct Found {
  bool here = false, elsewhere = false;
  void look(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == kStrict) here = true;
    else if (tensor.dim() > 0) elsewhere = true;  // numbers may come from anywhere
  }
  void look(const c10::IValue& value) {
    if (value.isTensor()) look(value.toTensor());
    else if (value.isTensorList()) for (const Tensor& each : value.toTensorVector()) look(each);
    else if (value.isOptionalTensorList())
      for (const auto& each : value.toOptionalTensorVector()) if (each) look(*each);
  }
};

void on_the_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& name = operation.schema().operator_name().name;
  Found found;
  for (const auto& argument : torch::jit::last(*stack, operation.schema().arguments().size())) {
    found.look(argument);
    TORCH_CHECK(!argument.isGenerator(), "STRICT: ", name, " draws with a generator of the CPU");
  }
  TORCH_CHECK(!(found.here && found.elsewhere) || may_mix.count(name), "STRICT: ", name, " mixes devices");
  at::native::cpu_fallback(operation, stack);
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  Found found;
  for (const auto& each : {input, weight, bias.value_or(Tensor())}) found.look(each);
  TORCH_CHECK(!found.elsewhere, "STRICT: convolution mixes devices");
  std::optional<Tensor> added;
  if (bias && bias->defined()) added = on_cpu(*bias);
  return brought(at::convolution(
      on_cpu(input).contiguous(), on_cpu(weight).contiguous(), added, stride, padding, dilation, transposed,
      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& error, const Tensor& input, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  Found found;
  for (const auto& each : {error, input, weight}) found.look(each);
  TORCH_CHECK(!found.elsewhere, "STRICT: convolution_backward mixes devices");
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  const auto [of_input, of_weight, of_bias] = at::convolution_backward(
      on_cpu(error).contiguous(), on_cpu(input).contiguous(), on_cpu(weight).contiguous(), IntArrayRef({channels}),
      stride, padding, dilation, transposed, output_padding, groups, wanted);
  return {brought(of_input), brought(of_weight), brought(of_bias)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_like_format);
  m.impl("empty_strided", &empty_with_strides);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &scalar_of);
  m.impl("resize_", &resized);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &unfolded);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

}  // namespace
