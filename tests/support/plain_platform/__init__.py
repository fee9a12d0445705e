"""A third platform, for tests: vLLM's CPU worker with attention in plain torch.

It has all that a new platform brings, and nothing else had to change for it. It uses no kernel of
vLLM's. A page holds token after token, 'torch' serves the ops, and a loop attends row by row.
"""
