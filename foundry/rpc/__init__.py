"""gRPC as all services use it: channels, servers, typed errors on the wire, tensors."""
