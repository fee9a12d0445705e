"""One prompt's way from queries to a region, on every device: plan, collect, score, select, move.

Knows pages and scores, not vLLM.
"""
