"""Who may speak in a conversation: a chat template would write any other word into its header as it is."""

ROLES = ("system", "user", "assistant")
