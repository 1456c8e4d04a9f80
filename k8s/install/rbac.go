package install

import (
	rbacv1 "k8s.io/api/rbac/v1"
	"strconv"
)

// AgentRules are what an agent may do in the whole cluster: the least that works. A test has it do each of them, and none that is not here.
func AgentRules() []rbacv1.PolicyRule {
	read := []string{"get", "list", "watch"}
	return []rbacv1.PolicyRule{
		// k8s.Source: Services and the backends that EndpointSlices name become rows; Namespaces' labels and those of this node's pods say who a pod is; the Node is
		// where an agent learns its address and its pods' ranges, and where nodes' zones are. "get" is for single objects: nodeinfo.go has the Node,
		// the CNI plugin's requests a pod that the watch has not shown yet, resolver.go the store's pods.
		{APIGroups: []string{""}, Resources: []string{"services", "namespaces", "pods", "nodes"}, Verbs: read},
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: read},
		// Source.Mirror, of the one agent that publishes: other clusters' endpoints of global services, "patch" being how they are applied on the server's side.
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"create", "patch", "delete"}},
		// What is wrong with a Service is told on the Service itself. "patch" counts one up that is there.
		{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
		// No Leases: which agent publishes for the cluster is decided by its own store, which works without the API server. No Secrets: an agent has its certificate
		// from the authority that the init container reads from a volume.
	}
}

func (v values) agentClusterRole() *rbacv1.ClusterRole {
	return &rbacv1.ClusterRole{ObjectMeta: v.clusterMeta(AgentName, agentComponent), Rules: AgentRules()}
}

func (v values) agentClusterRoleBinding() *rbacv1.ClusterRoleBinding {
	return &rbacv1.ClusterRoleBinding{
		ObjectMeta: v.clusterMeta(AgentName, agentComponent),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: AgentName},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: AgentName, Namespace: v.namespace}},
	}
}

// storeRole lets members find each other, in resolver.go: five at the most, and nothing else.
func (v values) storeRole() *rbacv1.Role {
	var members []string
	for i := range 5 {
		members = append(members, StoreName+"-"+strconv.Itoa(i))
	}
	return &rbacv1.Role{
		ObjectMeta: v.meta(StoreName, storeComponent),
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, ResourceNames: members, Verbs: []string{"get"}}},
	}
}

func (v values) storeRoleBinding() *rbacv1.RoleBinding {
	return &rbacv1.RoleBinding{
		ObjectMeta: v.meta(StoreName, storeComponent),
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: StoreName},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: StoreName, Namespace: v.namespace}},
	}
}
