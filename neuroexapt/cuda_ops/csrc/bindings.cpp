#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "sepconv.h"
#include "softmax_sum.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("MAX_OPERANDS") = kMaxOperands;
  m.attr("MAX_SPLITS") = kMaxSplits;
  pybind11::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16);
  m.def("softmax_sum_forward", &softmax_sum_forward);
  m.def("softmax_sum_backward", &softmax_sum_backward);
  pybind11::class_<sepconv::Shape>(m, "SepConvShape")
      .def(pybind11::init<int, int, int, int, int, int, int, int, int, int, bool>());
  m.def("sepconv_forward", &sepconv::forward);
  m.def("sepconv_backward", &sepconv::backward);
}
