"People who walk a circle of items: what comes next is certain, and popularity says nothing of it."
import numpy as np
from telemetry_loop.fit import Targets, TrainConfig

CFG = TrainConfig(dim=16, blocks=1, heads=2, length=6, dropout=.1, batch=16, epochs=8, patience=3, lr=.01, weight_decay=.01, average=.9, full_softmax=1000, negatives=32, half='auto', device='cpu', valid_rows=500, adhoc_epochs=3, inputs=['category'], parts=['network', 'counts', 'linear'], others=[], rewards={})
N = 12
START = np.random.default_rng(3).integers(0, N, 60)
CYCLE = [(np.arange(8) + s) % N for s in START]                        # 0 -> 1 -> 2 ..
ASK = Targets([(np.arange(3) + s) % N for s in range(N)], (np.arange(N) + 3) % N, np.arange(N), None, None)
