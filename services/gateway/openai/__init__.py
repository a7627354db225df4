"""OpenAI's API: requests and answers in its words."""
