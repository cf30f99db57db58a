"""One line around AdamW: an MLP on scikit-learn's handwritten digits, whose layers shrink as it trains."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from svd_optim import ConsoleReport, SubspaceAwareOptimizer

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
base = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer = SubspaceAwareOptimizer(base, model)  # the one line
report = ConsoleReport(every=20)
optimizer.add_listener(report)

for _ in range(60):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.observe_loss(loss)  # a change that raises it is undone

report.finish(optimizer.summary())  # the table and the summary
with torch.no_grad():
    accuracy = (model(images[test]).argmax(dim=1) == labels[test]).float().mean().item()
parameters = sum(p.numel() for p in model.parameters())
print(f"test accuracy {accuracy:.1%} with {parameters:,} parameters")
