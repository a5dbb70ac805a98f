// What torch asks of CUDA before it looks at a tensor's values: whether it is built, a guard for its device, a stream.
// A build of torch for CPUs alone has no answer, and autograd stops there, also on fake tensors, which have a device and
// no values. fake_cuda(1) gives the answers of one idle device, fake_cuda(0) takes them back.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
bool on = false;

struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return on; }
  bool hasCUDA() const override { return on; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "one is put in the place of the other");

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(CUDA, 0)); }
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(CUDA, 0); }
  c10::Device getDevice() const override { return c10::Device(CUDA, 0); }
  c10::Stream getStream(c10::Device) const noexcept override { return only(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only(); }
};

}  // namespace

extern "C" void fake_cuda(int wanted) {
  static const c10::impl::DeviceGuardImplInterface* before = nullptr;
  static const auto* own = new Guard();  // torch's registry never frees what is in it
  static bool placed = false;
  if (!placed) {
    // torch looks its hooks up once a process and keeps them: these take their place, and answer as those did while off
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
    placed = true;
  }
  auto& guard = c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)];
  if (wanted && !on) {
    before = guard.load();
    guard.store(own);
  } else if (!wanted && on) {
    guard.store(before);
  }
  on = wanted != 0;
}
