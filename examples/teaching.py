"""The method of svd_optim on one weight matrix, in plain PyTorch: measure, descend, factorize, train on in the factors.

W (m, n) is the weight, G its gradient; U (m, k), S (k,), V (n, k) are the k leading singular triplets of W.
"""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def leading(W: Tensor, k: int) -> tuple[Tensor, ...]:
    U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].mT  # U diag(S) V^T is the rank-k matrix nearest to W (Eckart-Young)


def outside(X: Tensor, Q: Tensor) -> Tensor:
    return X - Q @ (Q.mT @ X)  # (I - Q Q^T) X


def minor(X: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return outside(outside(X, U).mT, V).mT  # (I - U U^T) X (I - V V^T): 0 if X = K V^T + U L^T, whatever K and L


def measure(G: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...], steps: int) -> tuple[float, ...]:
    """Principal alignment, its excess over chance, tangent capture, its excess; and the drift from old to new."""
    (U, _, V), (U1, S1, V1) = old, new
    k_m, k_n = U.shape[1] / len(U), V.shape[1] / len(V)
    alignment = float((U.mT @ G).norm() / G.norm()) ** 2  # ||U^T G||^2 / ||G||^2: aims at what W has learned
    capture = 1 - float(minor(G, U, V).norm() / G.norm()) ** 2  # 1 - ||minor(G)||^2 / ||G||^2: rank k can follow
    chance = k_m, 1 - (1 - k_m) * (1 - k_n)  # of a random G: there the excess is 0, for all of G it is 1
    excess = [max(0.0, (x - c) / (1 - c)) for x, c in zip((alignment, capture), chance, strict=True)]
    sines = [float(outside(Q1 * S1, Q).norm() / S1.norm()) for Q, Q1 in ((U, U1), (V, V1))]  # ||(I - U U^T) U1 S1||
    return alignment, excess[0], capture, excess[1], min(1.0, max(sines) * 20 / steps)  # / ||S1||, per 20 steps


@torch.no_grad()
def tangent_step(base: torch.optim.SGD, K: Tensor, L: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """A step of W = K V^T + U L^T, from K = U diag(S), L = 0 and their gradients G V, G^T U. Returns the new U, V."""
    L.grad = outside(L.grad, V)  # (I - V V^T) G^T U: the rest of it is in G V already
    base.step()  # dW = -lr (G - minor(G)), as SGD is linear in G. Adam's steps: times sqrt(n/k) for K, sqrt(m/k) for L
    Q, R = torch.linalg.qr(K)  # W has rank 2k by now. Q spans W V, ...
    Z, T = torch.linalg.qr(V @ R.mT + L @ (U.mT @ Q))  # ... and Z T = W^T Q. Then of rank k, and close to W, is
    P, S, Oh = torch.linalg.svd(T.mT)  # Q Q^T W = Q T^T Z^T = (Q P) diag(S) (Z O)^T
    K[:], L[:] = Q @ P * S, 0
    return Q @ P, Z @ Oh.mT  # momentum would have to turn with these bases; plain SGD has none


def train(W: Tensor, x: Tensor, y: Tensor, k: int, lr: float, steps: int, interval: int, descent: int) -> Tensor:
    """Gradient descent on the mean of (x W^T - y)^2, first on W, then on its factors. Returns the last W."""
    base, basis, step, end = torch.optim.SGD([W], lr), leading(W, k), 0, float("inf")
    print("step    loss  alignment  (excess)  capture  (excess)    drift")
    while step < end:
        base.zero_grad()
        mse_loss(x @ W.mT, y).backward()
        base.step()
        step += 1
        basis = leading(W, k) if step == end - 1 else basis  # then only one more step will lead out of it
        W.data -= minor(W.data, basis[0], basis[2]) / max(1, end - step)  # 1 / (steps left); of inf: nothing
        if step % interval == 0 and step < end:
            old, basis = basis, leading(W, k)
            measured = measure(W.grad, old, basis, interval)
            print(f"{step:4} {mse_loss(x @ W.mT, y):.5f}", *(f"{x:9.3f}" for x in measured))
            end = min(end, step + descent) if measured[-1] < 0.3 else end  # the package waits for three in a row
    U, S, V = leading(W, k)
    K, L = (U * S).requires_grad_(), torch.zeros_like(V, requires_grad=True)
    base = torch.optim.SGD([K, L], lr)
    print(f"{step:4} {mse_loss(x @ W.mT, y):.5f} before the switch, {mse_loss(x @ V @ K.mT, y):.5f} after it")
    for _ in range(step, steps):
        base.zero_grad()
        mse_loss(x @ V @ K.mT + x @ L @ U.mT, y).backward()  # L = 0 is there for its gradient
        U, V = tangent_step(base, K, L, U, V)
    print(f"{steps:4} {mse_loss(x @ V @ K.mT, y):.5f} with {k * (len(U) + len(V) + 1)} of {W.numel()} parameters")
    return K @ V.mT


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(1024, 64) * torch.logspace(0, -1, 64)  # of inputs that vary little W learns slowly
    y = x @ torch.randn(64, 8) @ torch.randn(8, 48) / 8 + 0.1 * torch.randn(1024, 48)  # the teacher has rank 8
    train((torch.randn(48, 64) * 3 / 8).requires_grad_(), x, y, k=12, lr=5.0, steps=400, interval=20, descent=100)
