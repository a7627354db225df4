{{/* Settings of the services as FOUNDRY_* variables. */}}

{{/* Takes root and name. */}}
{{- define "foundry.env" -}}
{{- $values := index .root.Values .name -}}
{{- $service := index (include "foundry.services" .root | fromYaml) .name -}}
{{- $settings := dict "listen" (printf "0.0.0.0:%v" $service.port) "metrics_port" 9090 -}}
{{- with .root.Values.monitoring.otlpEndpoint }}{{ $_ := set $settings "otlp_endpoint" . }}{{ end -}}
{{- if $service.model }}
{{- $_ := set $settings "model" "/model" }}
{{- if gt (int $values.gpu.count) 0 }}{{ $_ := set $settings "device" "cuda" }}{{ end -}}
{{- end -}}
{{- if .root.Values.tls.enabled }}
{{- range $setting, $file := dict "certificate" "tls.crt" "key" "tls.key" "ca" "ca.crt" }}
{{- $_ := set $settings (printf "tls_%s_file" $setting) (printf "/etc/foundry/tls/%s" $file) }}
{{- end -}}
{{- end -}}
{{- if and (eq .name "gateway") $values.https.existingSecret }}
{{- $_ := set $settings "https_server_certificate_file" "/etc/foundry/https/tls.crt" }}
{{- $_ := set $settings "https_server_key_file" "/etc/foundry/https/tls.key" }}
{{- end -}}
{{- if .root.Values.rpc.tokens.enabled }}{{ $_ := set $settings "rpc_tokens_directory" "/run/secrets/foundry/rpc" }}{{ end -}}
{{- if eq .name "rollout" }}{{ $_ := set $settings "model_name" (include "foundry.model.name" .root) }}{{ end -}}
{{- if has .name (list "gateway" "trainer") }}
{{- $rollout := include "foundry.name" (dict "root" .root "name" "rollout") }}
{{- $_ := set $settings "rollout_addresses" (list (printf "%s:7001" $rollout)) }}
{{- $_ := set $settings "teacher_address" (printf "%s:7002" (include "foundry.name" (dict "root" .root "name" "teacher"))) }}
{{- end -}}
{{- if and (eq .name "gateway") .root.Values.gateway.apiKeys.enabled }}
{{- $_ := set $settings "api_keys" true }}
{{- $_ := set $settings "admin_key_file" "/run/secrets/foundry/api-key/api-key" }}
{{- end -}}
{{- if and (eq .name "gateway") (eq .root.Values.trainer.mode "jobs") }}
{{- $_ := set $settings "jobs__template" (include "foundry.name" (dict "root" .root "name" "trainer-job")) }}
{{- end -}}
{{- $settings = merge (dict) $values.settings $settings -}}
{{- if $service.store }}
{{- range $key, $value := merge (include "foundry.store.settings" .root | fromYaml) .root.Values.store.settings }}
{{- $_ := set $settings (printf "store__%s" $key) $value }}
{{- end -}}
{{- end -}}
{{- range $key, $value := $settings }}
{{- if kindIs "map" $value }}
{{- $settings = omit $settings $key }}
{{- range $below, $inner := $value }}{{ $_ := set $settings (printf "%s__%s" $key $below) $inner }}{{ end }}
{{- end }}
{{- end -}}
{{- range $key, $value := $settings }}
{{- if not (kindIs "invalid" $value) }}
- name: FOUNDRY_{{ upper $key }}
  value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
{{- end }}
{{- end }}
{{- if and $service.store .root.Values.objects.gcs.existingSecret }}
- name: GOOGLE_APPLICATION_CREDENTIALS
  value: /run/secrets/foundry/gcs/{{ .root.Values.objects.gcs.credentialsKey }}
{{- end }}
{{- /* The root file system is read-only: caches of libraries go to /tmp. */}}
- name: HOME
  value: /tmp
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
