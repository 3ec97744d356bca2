{{- define "tpd.labels" -}}
app.kubernetes.io/name: tpd-manager
app.kubernetes.io/part-of: tpd
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "tpd.selector" -}}
app.kubernetes.io/name: tpd-manager
{{- end }}
