package install

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

//go:generate go run causeway/deploy/chart ../../deploy/helm/causeway

// Stand-ins for values that have to be of a kind: a number of members, a size.
const (
	membersStandIn = 77777
	sizeStandIn    = "77777Gi"
)

// charted are the values of the objects in a chart: stand-ins, which become actions of Go's templates. A whole value gets quoted, so that no text of a user's becomes more than a value.
func charted() (values, []replacement) {
	v := values{
		clusterName: "x-clusterName-x", clusterID: "x-clusterID-x", namespace: "x-namespace-x", image: "x-image-x", mode: "x-mode-x", podCIDRs: "x-podCIDRs-x",
		serviceCIDRs: "x-serviceCIDRs-x", apiHost: "x-apiHost-x", apiPort: "x-apiPort-x", encryption: "x-encryption-x", members: membersStandIn,
		initialCluster: "x-initialCluster-x", storeEndpoints: "x-storeEndpoints-x", storageClass: "x-storageClass-x", storageSize: sizeStandIn, storeToken: "x-storeToken-x",
	}
	return v, []replacement{
		// What is there only if there is a value for it.
		{regexp.MustCompile(`(?m)^( *)storageClassName: x-storageClass-x\n`), "$1{{- with .Values.etcd.storageClass }}\n${1}storageClassName: {{ . | quote }}\n$1{{- end }}\n"},
		{regexp.MustCompile(`(?m)^( *)- name: KUBERNETES_SERVICE_HOST\n( *)value: x-apiHost-x\n *- name: KUBERNETES_SERVICE_PORT\n *value: x-apiPort-x\n`),
			"$1{{- with .Values.apiServer.host }}\n$1- name: KUBERNETES_SERVICE_HOST\n${2}value: {{ . | quote }}\n$1- name: KUBERNETES_SERVICE_PORT\n${2}value: {{ $$.Values.apiServer.port | quote }}\n$1{{- end }}\n"},
		whole("x-image-x", ".Values.image"), whole("x-namespace-x", ".Release.Namespace"),
		part("x-clusterName-x", `required "clusterName is the cluster's name in the mesh: set it" .Values.clusterName`),
		part("x-clusterID-x", "int .Values.clusterID"), part("x-namespace-x", ".Release.Namespace"), part("x-mode-x", ".Values.mode"),
		part("x-podCIDRs-x", `required "podCIDRs are the cluster's pod ranges: set them" .Values.podCIDRs | toJson`),
		part("x-serviceCIDRs-x", `required "serviceCIDRs are the cluster's service ranges: set them" .Values.serviceCIDRs | toJson`),
		part("x-encryption-x", ".Values.encryption"), part("77777Gi", ".Values.etcd.storageSize"), part("77777", "int .Values.etcd.members"),
		part("x-initialCluster-x", `include "causeway.initialCluster" .`), part("x-storeEndpoints-x", `include "causeway.storeEndpoints" .`),
		part("x-storeToken-x", "default .Release.Name .Values.etcd.token"),
	}
}

type replacement struct {
	of *regexp.Regexp
	by string
}

func part(standIn, action string) replacement {
	return replacement{regexp.MustCompile(regexp.QuoteMeta(standIn)), "{{ " + action + " }}"}
}

func whole(standIn, action string) replacement {
	return replacement{regexp.MustCompile(`(?m): ` + regexp.QuoteMeta(standIn) + `$`), ": {{ " + action + " | quote }}"}
}

// Chart returns the files of the Helm chart by their names in it. It makes the same objects as [Objects], but for the namespace and the options, which Helm keeps, and has the
// Secret with the authority be there before.
func Chart() (map[string][]byte, error) {
	v, replacements := charted()
	files := map[string][]byte{
		"Chart.yaml": []byte(chartHead), "values.yaml": []byte(chartValues), "templates/_helpers.tpl": []byte(chartHelpers()), "templates/NOTES.txt": []byte(chartNotes),
	}
	for _, object := range v.objects() {
		setKind(object)
		all, err := entries([]runtime.Object{object})
		if err != nil {
			return nil, err
		}
		e := all[0]
		text, err := yaml.Marshal(e.Object)
		if err != nil {
			return nil, fmt.Errorf("chart: %s: %w", e, err)
		}
		if bytes.Contains(text, []byte("{{")) {
			return nil, fmt.Errorf("chart: %s has what a template would take for an action", e)
		}
		for _, r := range replacements {
			text = r.of.ReplaceAll(text, []byte(r.by))
		}
		if left := regexp.MustCompile(`x-[A-Za-z]+-x`).Find(text); left != nil {
			return nil, fmt.Errorf("chart: %s: nothing takes the place of %s", e, left)
		}
		name := strings.ToLower(e.GetKind()) + "-" + strings.TrimPrefix(e.GetName(), "causeway-") + ".yaml"
		files["templates/"+name] = append([]byte(generated), text...)
	}
	return files, nil
}

const generated = "{{- /* Generated from k8s/install by go generate. Change it there. */ -}}\n"

const chartHead = `# Generated from k8s/install by go generate. Change it there.
apiVersion: v2
name: causeway
description: Causeway joins clusters into one network
type: application
version: 0.1.0
kubeVersion: ">=` + minimumVersion + `-0"
`

const chartValues = `# Generated from k8s/install by go generate. Change it there. docs/install.md says what each is for.

# The cluster's name in the mesh (required), and its ID, 1 to 255; 0 takes one that is free.
clusterName: ""
clusterID: 0

# Of agents and store.
image: ` + DefaultImage + `

# cni: pods have their network from Causeway. chained, from another CNI plugin, is not available yet.
mode: ` + ModeCNI + `

# The cluster's ranges (required): what kube-controller-manager has as --cluster-cidr, and kube-apiserver as --service-cluster-ip-range.
podCIDRs: []
serviceCIDRs: []

# Where nodes reach the API server without any Service, which agents make: needed where kube-proxy does not run.
apiServer:
  host: ""
  port: "6443"

# What WireGuard encrypts between nodes: all, inter-cluster, off.
encryption: all

etcd:
  # 1, 3 or 5, each on another node.
  members: 3
  # Empty: the cluster's default.
  storageClass: ""
  storageSize: ` + DefaultStorage + `
  # Another one for each set of volumes: change it after you have deleted them. Empty: the release's name.
  token: ""
`

const chartNotes = `Causeway is being started in {{ .Release.Namespace }}. Its pods wait for the Secret ` + AuthorityName + ` with the cluster's authority, unless it is there:

  clustermesh certs authority --cluster {{ .Values.clusterName }} --out DIRECTORY
  kubectl -n {{ .Release.Namespace }} create secret generic ` + AuthorityName + ` --from-file DIRECTORY/ca.crt --from-file DIRECTORY/ca.key
`

func chartHelpers() string {
	return fmt.Sprintf(`{{- /* Generated from k8s/install by go generate. Change it there. */ -}}
{{- define "causeway.initialCluster" -}}
{{- range $i := until (int .Values.etcd.members) }}{{ if $i }},{{ end }}%[1]s-{{ $i }}=%[1]s-{{ $i }}.%[1]s.{{ $.Release.Namespace }}.svc:%[2]d{{ end -}}
{{- end -}}
{{- define "causeway.storeEndpoints" -}}
[{{- range $i := until (int .Values.etcd.members) }}{{ if $i }},{{ end }}"https://%[1]s-{{ $i }}.%[1]s.{{ $.Release.Namespace }}.svc:%[3]d"{{ end -}}]
{{- end -}}
`, StoreName, StorePeerPort, StoreClientPort)
}
