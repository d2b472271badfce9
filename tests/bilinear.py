"""A layer kind that this package does not have, in one file as a user would write it."""

from torch import nn
from torch.nn import functional as F

from fedpara_peft import FedParaLayer
from fedpara_peft.tuner.plan import WeightShape


class Bilinear(FedParaLayer):
    """FedPara for ``nn.Bilinear``, whose second input takes the place of a kernel."""

    kind = "bilinear"
    base_classes = (nn.Bilinear,)

    @staticmethod
    def weights_of(base_layer):
        m, n, k = base_layer.weight.shape
        return {"weight": WeightShape(m, n, (k,), variance=1 / (3 * n))}

    @staticmethod
    def features_of(base_layer):
        return base_layer.in1_features, base_layer.out_features

    def forward(self, first, second):
        return F.bilinear(first, second, self.weight, self.get_base_layer().bias)
