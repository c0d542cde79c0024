// Azure Container Apps with PostgreSQL. This file was never compiled: run `az bicep build` first.
//   az deployment group create --resource-group kling-relay --template-file infra/azure/main.bicep --parameters ...

@description('Region of all resources.')
param location string = resourceGroup().location
@description('Container image, in a registry that the identity may pull from.')
param image string
@description('Login server of that registry.')
param registry string
@description('Keys that sign callback URLs. Generate them with: kling-relay keys new')
@secure()
param relayKeys string
@secure()
param klingApiKey string
@description('Token for senders of task.requested to /events, 16 characters or more.')
@secure()
param eventsToken string
@secure()
param postgresPassword string
@description('Content of relay.toml, with the hooks.')
@secure()
param relayToml string = ''

var name = 'kling-relay'
var postgres = '${name}-${uniqueString(resourceGroup().id)}'

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: name
  location: location
}

resource logs 'Microsoft.OperationalInsights/workspaces@2023-09-01' = {
  name: name
  location: location
  properties: { sku: { name: 'PerGB2018' }, retentionInDays: 30 }
}

resource server 'Microsoft.DBforPostgreSQL/flexibleServers@2024-08-01' = {
  name: postgres
  location: location
  sku: { name: 'Standard_B1ms', tier: 'Burstable' }
  properties: {
    version: '17'
    administratorLogin: 'relay'
    administratorLoginPassword: postgresPassword
    storage: { storageSizeGB: 32 }
    backup: { backupRetentionDays: 14 }
  }

  resource database 'databases' = { name: 'relay' }

  // Azure services may connect: without a virtual network, container apps have no fixed addresses.
  resource azure 'firewallRules' = {
    name: 'azure'
    properties: { startIpAddress: '0.0.0.0', endIpAddress: '0.0.0.0' }
  }
}

resource environment 'Microsoft.App/managedEnvironments@2024-03-01' = {
  name: name
  location: location
  properties: {
    appLogsConfiguration: {
      destination: 'log-analytics'
      logAnalyticsConfiguration: {
        customerId: logs.properties.customerId
        sharedKey: logs.listKeys().primarySharedKey
      }
    }
  }
}

var host = '${name}.${environment.properties.defaultDomain}'
var secrets = [
  { name: 'ledger', value: 'postgresql://relay:${uriComponent(postgresPassword)}@${server.properties.fullyQualifiedDomainName}/relay?sslmode=require' }
  { name: 'relay-keys', value: relayKeys }
  { name: 'kling-api-key', value: klingApiKey }
  { name: 'events-token', value: eventsToken }
  { name: 'relay-toml', value: empty(relayToml) ? '# no hooks' : relayToml }
]
var variables = [
  { name: 'KLING_RELAY_LEDGER', secretRef: 'ledger' }
  { name: 'KLING_RELAY_KEYS', secretRef: 'relay-keys' }
  { name: 'KLING_API_KEY', secretRef: 'kling-api-key' }
  { name: 'KLING_RELAY_EVENTS_TOKEN', secretRef: 'events-token' }
  { name: 'KLING_RELAY_PUBLIC_URL', value: 'https://${host}' }
  { name: 'KLING_RELAY_CONFIG', value: '/config/relay-toml' }
  { name: 'AZURE_CLIENT_ID', value: identity.properties.clientId }
]
var volumes = [ { name: 'config', storageType: 'Secret', secrets: [ { secretRef: 'relay-toml', path: 'relay-toml' } ] } ]
var mounts = [ { volumeName: 'config', mountPath: '/config' } ]
var identities = { type: 'UserAssigned', userAssignedIdentities: { '${identity.id}': {} } }
var registries = [ { server: registry, identity: identity.id } ]

resource app 'Microsoft.App/containerApps@2024-03-01' = {
  name: name
  location: location
  identity: identities
  properties: {
    environmentId: environment.id
    configuration: {
      ingress: { external: true, targetPort: 8080, transport: 'http' }
      registries: registries
      secrets: secrets
    }
    template: {
      containers: [
        {
          name: 'relay'
          image: image
          resources: { cpu: json('0.5'), memory: '1Gi' }
          env: concat(variables, [ { name: 'KLING_RELAY_DELIVER', value: 'inline' } ])
          volumeMounts: mounts
          probes: [
            { type: 'Liveness', httpGet: { path: '/healthz', port: 8080 } }
            { type: 'Readiness', httpGet: { path: '/readyz', port: 8080 } }
          ]
        }
      ]
      volumes: volumes
      scale: { minReplicas: 0, maxReplicas: 5, rules: [ { name: 'http', http: { metadata: { concurrentRequests: '50' } } } ] }
    }
  }
}

// The tick, as scheduled jobs of the same image: they deliver due events and poll overdue tasks.
resource tick 'Microsoft.App/jobs@2024-03-01' = [for step in [ 'deliver', 'poll' ]: {
  name: '${name}-${step}'
  location: location
  identity: identities
  properties: {
    environmentId: environment.id
    configuration: {
      triggerType: 'Schedule'
      scheduleTriggerConfig: { cronExpression: '* * * * *', parallelism: 1, replicaCompletionCount: 1 }
      replicaTimeout: 300
      replicaRetryLimit: 0
      registries: registries
      secrets: secrets
    }
    template: {
      containers: [ {
        name: step
        image: image
        args: [ step, '--once' ]
        resources: { cpu: json('0.25'), memory: '0.5Gi' }
        env: variables
        volumeMounts: mounts
      } ]
      volumes: volumes
    }
  }
}]

output publicUrl string = 'https://${host}'
output events string = 'https://${host}/events'
