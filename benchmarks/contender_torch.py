"""curvlinops, and laplace-torch with each of its back ends that computes Kronecker factors."""

import importlib.metadata
import warnings
from typing import Any, NamedTuple

import models_torch
import torch
import workloads
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from laplace import Laplace
from laplace.curvature import (
    AsdlEF,
    AsdlGGN,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
)
from laplace.utils import Kron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from worker import Task

warnings.filterwarnings("ignore")

FISHER_TYPES = {"type2": "type-2", "mc": "mc", "empirical": "empirical"}
BACKENDS = {
    "laplace-torch curvlinops": {"exact": CurvlinopsGGN, "empirical": CurvlinopsEF},
    "laplace-torch BackPACK": {"exact": BackPackGGN},
    "laplace-torch ASDL": {"exact": AsdlGGN, "empirical": AsdlEF},
}


def versions() -> dict[str, str]:
    names = ("torch", "curvlinops-for-pytorch", "laplace-torch", "backpack-for-pytorch")
    found = {name: importlib.metadata.version(name) for name in (*names, "asdfghjkl")}
    return {**found, "torch threads": str(torch.get_num_threads())}


class Setting(NamedTuple):
    """A workload in torch."""

    workload: workloads.Workload
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """The data in batches."""
        size = self.workload.batch_size
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


def setting(case: dict[str, Any]) -> Setting:
    workload = workloads.from_description(case["workload"])
    x, y = workloads.data(workload)
    model = models_torch.model(workload)
    return Setting(workload, model, models_torch.inputs(x), torch.tensor(y))


# -- curvlinops --------------------------------------------------------------------------------


def linear_operator(kind: Any, s: Setting, fisher_type: str) -> Any:
    return kind(
        s.model, nn.CrossEntropyLoss(reduction="sum"), list(s.model.parameters()), s.batches,
        fisher_type=FISHER_TYPES[fisher_type], separate_weight_and_bias=False,
        check_deterministic=False, num_data=len(s.x), num_per_example_loss_terms=1,
    )  # fmt: skip


def factors(contender: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    if contender != "curvlinops":
        return factors_of_laplace(contender, s, case["variant"])

    def run() -> Any:
        operator = linear_operator(KFACLinearOperator, s, case["variant"])
        operator.compute_kronecker_factors()
        return operator

    return Task(run, lambda operator: float(operator.trace), s.workload.fraction)


def ekfac(_: str, case: dict[str, Any]) -> Task:
    s = setting(case)

    def run() -> Any:
        operator = linear_operator(EKFACLinearOperator, s, case["variant"])
        operator.compute_kronecker_factors()
        operator.compute_eigenvalue_correction()
        return operator

    return Task(run, lambda operator: float(operator.trace))


# -- laplace-torch -----------------------------------------------------------------------------


def approximation(contender: str, s: Setting, fisher_type: str) -> Any:
    backends: dict[str, Any] = BACKENDS[contender]
    kind = "empirical" if fisher_type == "empirical" else "exact"
    if kind not in backends:
        msg = "has no empirical Kronecker factors"
        raise NotImplementedError(msg)
    options = {"stochastic": fisher_type == "mc"} if kind == "exact" else {}
    return Laplace(
        s.model, "classification", subset_of_weights="all", hessian_structure="kron",
        backend=backends[kind], backend_kwargs=options,
    )  # fmt: skip


def fitted(contender: str, s: Setting, fisher_type: str = "mc") -> Any:
    loader = DataLoader(TensorDataset(s.x, s.y), batch_size=s.workload.batch_size)
    laplace = approximation(contender, s, fisher_type)
    laplace.fit(loader)
    return laplace


def factors_of_laplace(contender: str, s: Setting, fisher_type: str) -> Task:
    """What `fit` does with its back end, without the eigendecompositions at its end."""
    laplace = approximation(contender, s, fisher_type)
    with torch.no_grad():
        laplace.model.output_size = s.workload.classes
    parameters = list(s.model.parameters())

    def run() -> Any:
        total = Kron.init_from_model(parameters, "cpu", torch.float32)
        for x, y in s.batches:
            s.model.zero_grad()
            _, kron = laplace.backend.kron(x, y, N=len(s.x))
            total += kron
        return total

    return Task(run, lambda kron: float(kron.diag().sum()), s.workload.fraction)


def eigen(contender: str, case: dict[str, Any]) -> Task:
    laplace = fitted(contender, setting(case))
    return Task(laplace.H_facs.decompose)


def evidence(contender: str, case: dict[str, Any]) -> Task:
    laplace = fitted(contender, setting(case))

    def run() -> Any:
        prior_prec = torch.ones(1, requires_grad=True)
        value = laplace.log_marginal_likelihood(prior_prec)
        value.backward()
        return value.detach(), prior_prec.grad

    return Task(run)


def predictive(contender: str, case: dict[str, Any]) -> Task:
    """The GLM predictive with the probit link: its covariances cost all of the time."""
    s = setting(case)
    laplace = fitted(contender, s)
    laplace.prior_precision = 1.0
    number = case["few"]
    return Task(lambda: laplace(s.x[:number]), fraction=number / case["variant"])


def samples(contender: str, case: dict[str, Any]) -> Task:
    laplace = fitted(contender, setting(case))
    return Task(lambda: laplace.sample(case["variant"]))


def cold(contender: str, case: dict[str, Any]) -> Task:
    s = setting(case)
    return Task(lambda: fitted(contender, s, "type2"))


QUESTIONS = {
    "factors": factors,
    "ekfac": ekfac,
    "eigen": eigen,
    "evidence": evidence,
    "predictive": predictive,
    "samples": samples,
    "cold": cold,
}
