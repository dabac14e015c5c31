"""Model types that publishers ship with code of their own although transformers has the same
architecture under another name. Their configurations are read as that one; no foreign code runs.
"""

ALIASES = {
    "kimi_k2": "deepseek_v3",  # Kimi-K2: DeepSeek-V3's layers with one group of experts
}
