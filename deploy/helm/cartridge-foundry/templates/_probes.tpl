{{/* Takes root and name. Serving is asked by the standard health service; alive is whoever gives any answer, one that is
being drained included. Under mutual TLS, and before 1.24, the kubelet cannot ask itself. */}}
{{- define "foundry.probes" -}}
{{- $probes := (index .root.Values .name).probes -}}
{{- $port := (index (include "foundry.services" .root | fromYaml) .name).port -}}
{{- $native := and (not .root.Values.tls.enabled) (semverCompare ">=1.24-0" .root.Capabilities.KubeVersion.Version) -}}
{{- range $kind := list "startup" "readiness" "liveness" }}
{{ $kind }}Probe:
  {{- if eq $.name "gateway" }}
  httpGet:
    path: {{ ternary "/readyz?exclude=store" "/healthz" (eq $kind "readiness") }}
    port: http
    {{- if $.root.Values.gateway.https.existingSecret }}
    scheme: HTTPS
    {{- end }}
  {{- else if eq $kind "liveness" }}
  exec: {command: [python, -m, foundry.rpc.probe, --live]}
  {{- else if $native }}
  grpc: {port: {{ $port }}}
  {{- else }}
  exec: {command: [python, -m, foundry.rpc.probe]}
  {{- end }}
  {{- toYaml (index $probes $kind) | nindent 2 }}
{{- end }}
{{- end -}}
