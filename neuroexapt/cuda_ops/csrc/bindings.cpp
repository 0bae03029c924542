#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cell_conv.h"
#include "cell_strided.h"
#include "dense_conv.h"
#include "node.h"
#include "partial_sums.h"
#include "pointwise.h"
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

  using sepconv::Address;
  pybind11::class_<sepconv::Shape>(m, "SepConvShape")
      .def(pybind11::init<int, int, int, int, int, int, int, int, int, int, bool>());
  pybind11::class_<sepconv::Job>(m, "SepConvJob")
      .def(pybind11::init<Address, Address, Address, Address, std::int64_t>());
  pybind11::class_<sepconv::GradJob>(m, "SepConvGradJob")
      .def(pybind11::init<Address, std::int64_t, Address, std::int64_t, Address, Address, Address, Address, Address,
                          Address, Address, Address, Address>());
  m.def("sepconv_forward", &sepconv::forward);
  m.def("sepconv_backward", &sepconv::backward);

  pybind11::class_<pointwise::Shape>(m, "PointwiseShape")
      .def(pybind11::init<int, int, int, int, int, int, bool, bool>());
  pybind11::class_<pointwise::Job>(m, "PointwiseJob")
      .def(pybind11::init<Address, std::int64_t, int, Address, Address, std::int64_t, Address, std::int64_t>());
  pybind11::class_<pointwise::Source>(m, "PointwiseSource")
      .def(pybind11::init<Address, std::int64_t, Address, std::int64_t, Address, Address, Address>());
  pybind11::class_<pointwise::Target>(m, "PointwiseTarget")
      .def(pybind11::init<Address, std::int64_t, int, Address, std::vector<pointwise::Source>>());
  m.def("pointwise_forward_parts", &pointwise::forward_parts);
  m.def("pointwise_backward_parts", &pointwise::backward_parts);
  m.def("pointwise_forward", &pointwise::forward);
  m.def("pointwise_backward", &pointwise::backward);

  pybind11::class_<cell_conv::Shape>(m, "ConvShape")
      .def(pybind11::init<int, int, int, int, bool, bool>());
  pybind11::class_<cell_conv::Job>(m, "ConvJob")
      .def(pybind11::init<Address, std::int64_t, Address, Address, Address, Address, Address, Address, int, int>());
  pybind11::class_<cell_conv::GradJob>(m, "ConvGradJob")
      .def(pybind11::init<Address, std::int64_t, Address, Address, Address, std::int64_t, Address, Address, Address,
                          Address, Address, Address, Address, Address, int, int>());
  pybind11::class_<cell_conv::CoefJob>(m, "ConvCoefJob").def(pybind11::init<Address, Address, Address>());
  m.def("cell_conv_forward_parts", &cell_conv::forward_parts);
  m.def("cell_conv_backward_parts", &cell_conv::backward_parts);
  m.def("cell_conv_dx_splits", &cell_conv::dx_splits);
  m.def("cell_conv_forward", &cell_conv::forward);
  m.def("cell_conv_backward_first", &cell_conv::backward_first);
  m.def("cell_conv_backward_second", &cell_conv::backward_second);
  m.def("cell_conv_first_coefficients", &cell_conv::first_coefficients);

  pybind11::class_<cell_strided::Shape>(m, "StridedShape")
      .def(pybind11::init<int, int, int, int, bool, bool>());
  pybind11::class_<cell_strided::Job>(m, "StridedJob")
      .def(pybind11::init<Address, std::int64_t, Address, Address, Address, Address, Address, int, int>());
  pybind11::class_<cell_strided::GradJob>(m, "StridedGradJob")
      .def(pybind11::init<Address, std::int64_t, Address, Address, Address, Address, Address, Address, Address, int,
                          int>());
  pybind11::class_<cell_strided::StateGrad>(m, "StridedStateGrad")
      .def(pybind11::init<Address, std::int64_t, Address, std::vector<cell_strided::GradJob>>());
  m.def("cell_strided_forward_parts", &cell_strided::forward_parts);
  m.def("cell_strided_forward", &cell_strided::forward);
  m.def("cell_strided_backward_takes", &cell_strided::backward_takes);
  m.def("cell_strided_backward_parts", &cell_strided::backward_parts);
  m.def("cell_strided_backward", &cell_strided::backward);

  pybind11::class_<dense_conv::Shape>(m, "DenseShape").def(pybind11::init<int, int, int, int, bool, bool>());
  pybind11::class_<dense_conv::Input>(m, "DenseInput").def(pybind11::init<Address, std::int64_t>());
  pybind11::class_<dense_conv::Job>(m, "DenseJob").def(pybind11::init<Address, Address, Address, Address, int>());
  pybind11::class_<dense_conv::GradJob>(m, "DenseGradJob")
      .def(pybind11::init<Address, std::int64_t, Address, Address, Address, Address, Address, int>());
  m.def("dense_conv_forward_parts", &dense_conv::forward_parts);
  m.def("dense_conv_backward_parts", &dense_conv::backward_parts);
  m.def("dense_conv_dx_splits", &dense_conv::dx_splits);
  m.def("dense_conv_forward", &dense_conv::forward);
  m.def("dense_conv_input_gradient", &dense_conv::input_gradient);
  m.def("dense_conv_weight_gradients", &dense_conv::weight_gradients);

  pybind11::class_<node::Tensor>(m, "NodeTensor").def(pybind11::init<Address, std::int64_t>());
  pybind11::class_<node::Shape>(m, "NodeShape").def(pybind11::init<int, int, int, bool>());
  pybind11::class_<node::PoolShape>(m, "PoolShape")
      .def(pybind11::init<int, int, int, int, int, int, int, int, bool>());
  pybind11::class_<node::MomentsJob>(m, "MomentsJob").def(pybind11::init<node::Tensor, Address>());
  pybind11::class_<node::StatsJob>(m, "StatsJob")
      .def(pybind11::init<Address, int, Address, Address, Address, Address, Address>());
  pybind11::class_<node::PoolJob>(m, "PoolJob")
      .def(pybind11::init<node::Tensor, Address, Address, Address, Address, std::vector<Address>>());
  pybind11::class_<node::Term>(m, "NodeTerm").def(pybind11::init<node::Tensor, Address, Address>());
  pybind11::class_<node::DotTerm>(m, "NodeDotTerm").def(pybind11::init<node::Tensor, Address, int, int>());
  pybind11::class_<node::PooledTerms>(m, "NodePooledTerms")
      .def(pybind11::init<node::Tensor, int, int, int, Address, Address, std::int16_t, std::int16_t, std::int16_t,
                          std::int16_t>());
  pybind11::class_<node::TermGradient>(m, "NodeTermGradient")
      .def(pybind11::init<Address, Address, Address, Address>());
  pybind11::class_<node::AffineJob>(m, "AffineJob")
      .def(pybind11::init<node::Tensor, node::Tensor, Address, Address>());
  pybind11::class_<node::StateEdge>(m, "StateEdge")
      .def(pybind11::init<node::Tensor, Address, Address, Address>());
  pybind11::class_<node::StateJob>(m, "StateJob")
      .def(pybind11::init<node::Tensor, std::vector<node::StateEdge>, std::vector<node::Tensor>, Address,
                           bool>());
  m.def("node_parts", &node::parts);
  m.def("node_pool_parts", &node::pool_parts);
  m.def("node_moments", &node::plane_moments);
  m.def("node_finalize", &node::finalize);
  m.def("node_pool", &node::pool);
  m.def("node_sum", &node::sum);
  m.def("node_dots", &node::dots);
  m.def("node_coefficients", &node::coefficients);
  m.def("node_affine_gradient", &node::affine_gradient);
  m.def("node_state_gradients", &node::state_gradients);

  pybind11::class_<partial_sums::Job>(m, "PartialSumsJob").def(pybind11::init<Address, Address, Address, int, int>());
  m.def("partial_sums_add_up", &partial_sums::add_up);
}
