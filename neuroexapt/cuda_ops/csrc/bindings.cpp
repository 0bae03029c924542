#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
}
