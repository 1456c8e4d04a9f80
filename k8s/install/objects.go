package install

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"causeway/agent/api"
	"causeway/clustermesh/peering"
)

// Names of objects.
const (
	AgentName   = "causeway-agent"   // ServiceAccount, ClusterRole, ConfigMap, DaemonSet
	StoreName   = "causeway-etcd"    // ServiceAccount, Role, Service, StatefulSet, PodDisruptionBudget
	PeeringName = "causeway-peering" // Service
	// AuthorityName is that of the Secret that holds the cluster's certificate authority as ca.crt and ca.key.
	AuthorityName = "causeway-authority"
	// OptionsName is that of the ConfigMap that keeps Options.
	OptionsName = "causeway-install"
	optionsKey  = "options.yaml"
)

const (
	// AgentContainer is the agents' in their pods.
	AgentContainer = "agent"
	// Program of the image.
	Program = "/clustermesh"
)

// Ports of the store's pods, at their nodes' addresses, and so none of those that another etcd on the node has. See also the agent's.
const (
	StoreClientPort = 7961
	StorePeerPort   = 7962
	StoreHealthPort = 7963 // on the loopback
)

// Paths on nodes.
const (
	stateDir      = "/var/lib/causeway"
	pkiDir        = stateDir + "/pki"
	storeDataDir  = "/var/lib/causeway-etcd"
	configDir     = "/etc/causeway"
	authorityDir  = "/authority"
	hostBinDir    = "/opt/cni/bin"
	hostConfDir   = "/etc/cni/net.d"
	outlivingCgrp = "/sys/fs/cgroup/causeway"
)

const (
	labelName      = "app.kubernetes.io/name"
	labelComponent = "app.kubernetes.io/component"
	labelPartOf    = "app.kubernetes.io/part-of"
	agentComponent = "agent"
	storeComponent = "store"
)

// values are Options as the objects have them: texts, so that a chart can have something else in their place.
type values struct {
	clusterName, clusterID, namespace, image, mode string
	podCIDRs, serviceCIDRs                         string // JSON
	apiHost, apiPort, encryption                   string
	members                                        int32
	initialCluster                                 string
	storeEndpoints                                 string // JSON
	storageClass, storageSize, storeToken          string
}

func (o *Options) values() values {
	v := values{
		clusterName: o.ClusterName, clusterID: strconv.Itoa(int(o.ClusterID)), namespace: o.Namespace, image: o.Image, mode: o.Mode,
		podCIDRs: list(texts(o.PodCIDRs)), serviceCIDRs: list(texts(o.ServiceCIDRs)), encryption: string(o.Encryption),
		members: int32(o.Members), storageClass: o.StorageClass, storageSize: o.StorageSize, storeToken: o.StoreToken,
	}
	if o.APIServer != "" {
		v.apiHost, v.apiPort, _ = net.SplitHostPort(o.APIServer) // Check has done it
	}
	var initial, endpoints []string
	for i := range o.Members {
		name := StoreName + "-" + strconv.Itoa(i)
		host := name + "." + StoreName + "." + o.Namespace + ".svc"
		initial = append(initial, fmt.Sprintf("%s=%s:%d", name, host, StorePeerPort))
		endpoints = append(endpoints, fmt.Sprintf("https://%s:%d", host, StoreClientPort))
	}
	v.initialCluster, v.storeEndpoints = strings.Join(initial, ","), list(endpoints)
	return v
}

func texts(prefixes []netip.Prefix) (out []string) {
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}

// list is a list in JSON, which is YAML too.
func list(texts []string) string {
	out, err := json.Marshal(texts)
	if err != nil {
		panic(err) // texts can be written
	}
	return string(out)
}

// Objects are all of an installation in the order in which they are made, except for the Secret with the authority. Options must have passed Check.
func Objects(o Options) ([]runtime.Object, error) {
	kept, err := yaml.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("install: options: %w", err)
	}
	v := o.values()
	options := &corev1.ConfigMap{ObjectMeta: v.meta(OptionsName, ""), Data: map[string]string{optionsKey: string(kept)}}
	all := append([]runtime.Object{v.makeNamespace(), options}, v.objects()...)
	for _, object := range all {
		setKind(object)
	}
	return all, nil
}

// objects are those that a chart has too: it leaves the namespace and the options to Helm.
func (v values) objects() []runtime.Object {
	return []runtime.Object{
		v.serviceAccount(AgentName, agentComponent), v.agentClusterRole(), v.agentClusterRoleBinding(),
		v.serviceAccount(StoreName, storeComponent), v.storeRole(), v.storeRoleBinding(),
		v.agentConfig(),
		v.storeService(), v.storeBudget(), v.store(),
		v.agent(), v.peeringService(),
	}
}

func (v values) meta(name, component string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: v.namespace, Labels: labels(component)}
}

// clusterMeta is that of an object of the whole cluster.
func (v values) clusterMeta(name, component string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Labels: labels(component)}
}

func labels(component string) map[string]string {
	l := map[string]string{labelName: "causeway", labelPartOf: "causeway"}
	if component != "" {
		l[labelComponent] = component
	}
	return l
}

// selector finds the pods of a component.
func selector(component string) map[string]string {
	return map[string]string{labelName: "causeway", labelComponent: component}
}

// AgentLabels are those by which agents' pods are found.
func AgentLabels() map[string]string { return selector(agentComponent) }

func (v values) makeNamespace() *corev1.Namespace {
	meta := v.clusterMeta(v.namespace, "")
	// Agents are privileged pods of the node's network: see node.go.
	meta.Labels["pod-security.kubernetes.io/enforce"] = "privileged"
	return &corev1.Namespace{ObjectMeta: meta}
}

func (v values) serviceAccount(name, component string) *corev1.ServiceAccount {
	return &corev1.ServiceAccount{ObjectMeta: v.meta(name, component)}
}

// agentConfig has what is the same on all nodes: what is a node's own the agent learns from its Node.
func (v values) agentConfig() *corev1.ConfigMap {
	config := strings.Join([]string{
		"cluster:",
		"  name: " + v.clusterName,
		"  id: " + v.clusterID,
		"  podCIDRs: " + v.podCIDRs,
		"  serviceCIDRs: " + v.serviceCIDRs,
		"kubernetes:",
		"  inCluster: true",
		"kvstore:",
		"  endpoints: " + v.storeEndpoints,
		"  caFile: " + pkiDir + "/ca.crt",
		"  certFile: " + pkiDir + "/agent.crt",
		"  keyFile: " + pkiDir + "/agent.key",
		"encryption:",
		"  mode: " + v.encryption,
		"  cgroup: " + outlivingCgrp + "/wireguard",
		"proxy:",
		"  cgroup: " + outlivingCgrp + "/proxy",
		"socket: " + api.DefaultSocket,
		"stateDir: " + stateDir,
		"",
	}, "\n")
	return &corev1.ConfigMap{ObjectMeta: v.meta(AgentName, agentComponent), Data: map[string]string{"agent.yaml": config}}
}

// peeringService has the addresses of the API between clusters behind one name. Agents serve it at their nodes' addresses, which tokens name; this is for who publishes it by
// other means, and is no more than a list of them inside of the cluster.
func (v values) peeringService() *corev1.Service {
	return &corev1.Service{
		ObjectMeta: v.meta(PeeringName, agentComponent),
		Spec: corev1.ServiceSpec{
			Selector: selector(agentComponent),
			Ports:    []corev1.ServicePort{{Name: "peering", Port: peering.DefaultPort, Protocol: corev1.ProtocolTCP}},
		},
	}
}
