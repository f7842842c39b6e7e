"""The paper's tables and observations, from shipped configs: what to run, what was published, what came out."""
