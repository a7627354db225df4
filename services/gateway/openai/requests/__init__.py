"""OpenAI's requests, as far as a frozen language model can honour them.

A parameter is honoured, or neutral (it has no effect at the value given), or documented as ignored, or refused: none is
dropped in silence. Extensions: `cartridges`, `return_token_ids`, and vLLM's `top_k`, `min_p`, `min_tokens`,
`stop_token_ids`, `repetition_penalty`, `ignore_eos`, `prompt_logprobs` and `structured_outputs`.
"""
